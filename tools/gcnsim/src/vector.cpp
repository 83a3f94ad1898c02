// Vector ALU: VOP1, VOP2 and VOP3 that are one function per lane. AMD CDNA3 ISA 12.7 to 12.12, RDNA3 ISA 16.7 to 16.13.
//
// Transcendentals are correctly rounded here; hardware is within 1 ulp.
#include "lanewise.h"

namespace {

u32 permute_byte(u64 source, u32 selector) {
  if (selector >= 13) return 0xff;
  if (selector == 12) return 0;
  if (selector >= 8) return source >> ((selector - 8) * 16 + 15) & 1 ? 0xff : 0;
  return source >> selector * 8 & 0xff;
}

u32 permute_bytes(u64 source, u32 selectors) {
  u32 r = 0;
  for (int k = 0; k < 4; k++) r |= permute_byte(source, selectors >> 8 * k & 0xff) << 8 * k;
  return r;
}

i32 low24(u32 a) { return i32(a << 8) >> 8; }

f32 median(f32 a, f32 b, f32 c) {
  if (a != a || b != b || c != c) return min_number(min_number(a, b), c);
  return max_number(min_number(a, b), min_number(max_number(a, b), c));
}

Half fma_half(f64 a, f64 b, f64 c) { return bits<Half>(double_to_half(std::fma(a, b, c))); }

void add_conversions(Opcodes& ops) {
  ops.add("v_mov_b32", unary<u32, u32>([](u32 a) { return a; }));
  ops.add("v_mov_b64", unary<u64, u64>([](u64 a) { return a; }));
  ops.add("v_mov_b16", unary<u16, u16>([](u16 a) { return a; }));
  ops.add("v_not_b32", unary<u32, u32>([](u32 a) { return ~a; }));
  ops.add("v_not_b16", unary<u16, u16>([](u16 a) { return u16(~a); }));
  ops.add("v_bfrev_b32", unary<u32, u32>([](u32 a) { return reverse_bits(a); }));
  ops.add("v_cvt_f32_u32", unary<f32, u32>([](u32 a) { return f32(a); }));
  ops.add("v_cvt_f32_i32", unary<f32, i32>([](i32 a) { return f32(a); }));
  ops.add("v_cvt_u32_f32", unary<u32, f32>([](f32 a) { return saturate_u32(a); }));
  ops.add("v_cvt_i32_f32", unary<i32, f32>([](f32 a) { return saturate_i32(a); }));
  ops.add("v_cvt_f32_f16", unary<f32, Half>([](Half a) { return f32(a); }));
  ops.add("v_cvt_f16_f32", unary<Half, f32>([](f32 a) { return Half(a); }));
  ops.add("v_cvt_f32_bf16", unary<f32, u16>([](u16 a) { return bfloat_to_float(a); }));
  ops.add("v_cvt_f64_f32", unary<f64, f32>([](f32 a) { return f64(a); }));
  ops.add("v_cvt_f32_f64", unary<f32, f64>([](f64 a) { return f32(a); }));
  ops.add("v_cvt_f64_i32", unary<f64, i32>([](i32 a) { return f64(a); }));
  ops.add("v_cvt_f64_u32", unary<f64, u32>([](u32 a) { return f64(a); }));
  ops.add("v_cvt_f16_u16", unary<Half, u16>([](u16 a) { return Half(f32(a)); }));
  ops.add("v_cvt_f16_i16", unary<Half, i16>([](i16 a) { return Half(f32(a)); }));
  ops.add("v_cvt_f32_ubyte0", unary<f32, u32>([](u32 a) { return f32(a & 255); }));
  ops.add("v_cvt_f32_ubyte1", unary<f32, u32>([](u32 a) { return f32(a >> 8 & 255); }));
  ops.add("v_cvt_f32_ubyte2", unary<f32, u32>([](u32 a) { return f32(a >> 16 & 255); }));
  ops.add("v_cvt_f32_ubyte3", unary<f32, u32>([](u32 a) { return f32(a >> 24); }));
  ops.add("v_cvt_pk_bf16_f32",
          binary<u32, f32, f32>([](f32 a, f32 b) { return pack(float_to_bfloat(a), float_to_bfloat(b)); }));
  ops.add("v_cvt_pk_f16_f32",
          binary<u32, f32, f32>([](f32 a, f32 b) { return pack(float_to_half(a), float_to_half(b)); }));
  ops.add({"v_cvt_pkrtz_f16_f32", "v_cvt_pk_rtz_f16_f32"}, binary<u32, f32, f32>([](f32 a, f32 b) {
            return pack(float_to_half_toward_zero(a), float_to_half_toward_zero(b));
          }));
  ops.add("v_cvt_pk_u16_u32",
          binary<u32, u32, u32>([](u32 a, u32 b) { return smaller(a, 65535u) | smaller(b, 65535u) << 16; }));
  ops.add("v_pack_b32_f16", binary<u32, Half, Half>([](Half a, Half b) { return pack(a.raw, b.raw); }));
}

void add_float_functions(Opcodes& ops) {
  ops.add("v_exp_f32", unary<f32, f32>([](f32 a) { return flush(std::exp2(a)); }));
  ops.add("v_log_f32", unary<f32, f32>([](f32 a) { return std::log2(flush(a)); }));
  ops.add({"v_rcp_f32", "v_rcp_iflag_f32"}, unary<f32, f32>([](f32 a) { return 1.f / a; }));
  ops.add("v_rsq_f32", unary<f32, f32>([](f32 a) { return f32(1.0 / std::sqrt(f64(a))); }));
  ops.add("v_sqrt_f32", unary<f32, f32>([](f32 a) { return std::sqrt(a); }));
  ops.add("v_floor_f32", unary<f32, f32>([](f32 a) { return std::floor(a); }));
  ops.add("v_ceil_f32", unary<f32, f32>([](f32 a) { return std::ceil(a); }));
  ops.add("v_trunc_f32", unary<f32, f32>([](f32 a) { return std::trunc(a); }));
  ops.add("v_rndne_f32", unary<f32, f32>([](f32 a) { return std::nearbyint(a); }));
  ops.add("v_fract_f32", unary<f32, f32>([](f32 a) { return a - std::floor(a); }));
  // The argument of sine and cosine is in turns.
  ops.add("v_sin_f32", unary<f32, f32>([](f32 a) { return f32(std::sin(f64(a) * 6.283185307179586)); }));
  ops.add("v_cos_f32", unary<f32, f32>([](f32 a) { return f32(std::cos(f64(a) * 6.283185307179586)); }));
  ops.add("v_exp_f16", unary<Half, Half>([](Half a) { return Half(std::exp2(f32(a))); }));
  ops.add("v_rcp_f16", unary<Half, Half>([](Half a) { return Half(1.f / f32(a)); }));
  ops.add("v_add_f32", binary<f32, f32, f32>([](f32 a, f32 b) { return a + b; }));
  ops.add("v_sub_f32", binary<f32, f32, f32>([](f32 a, f32 b) { return a - b; }));
  ops.add("v_subrev_f32", binary<f32, f32, f32>([](f32 a, f32 b) { return b - a; }));
  ops.add("v_mul_f32", binary<f32, f32, f32>([](f32 a, f32 b) { return a * b; }));
  ops.add({"v_mul_legacy_f32", "v_mul_dx9_zero_f32"},
          binary<f32, f32, f32>([](f32 a, f32 b) { return a == 0 || b == 0 ? 0.f : a * b; }));
  ops.add({"v_max_f32", "v_max_num_f32"}, binary<f32, f32, f32>([](f32 a, f32 b) { return max_number(a, b); }));
  ops.add({"v_min_f32", "v_min_num_f32"}, binary<f32, f32, f32>([](f32 a, f32 b) { return min_number(a, b); }));
  ops.add("v_ldexp_f32", binary<f32, f32, i32>([](f32 a, i32 b) { return std::ldexp(a, b); }));
  ops.add("v_ldexp_f64", binary<f64, f64, i32>([](f64 a, i32 b) { return std::ldexp(a, b); }));
  ops.add("v_add_f16", binary<Half, Half, Half>([](Half a, Half b) { return Half(f32(a) + f32(b)); }));
  ops.add("v_sub_f16", binary<Half, Half, Half>([](Half a, Half b) { return Half(f32(a) - f32(b)); }));
  ops.add("v_mul_f16", binary<Half, Half, Half>([](Half a, Half b) { return Half(f32(a) * f32(b)); }));
  ops.add({"v_max_f16", "v_max_num_f16"},
          binary<Half, Half, Half>([](Half a, Half b) { return Half(max_number(a, b)); }));
  ops.add({"v_min_f16", "v_min_num_f16"},
          binary<Half, Half, Half>([](Half a, Half b) { return Half(min_number(a, b)); }));
  ops.add({"v_add_f64", "v_add_nc_f64"}, binary<f64, f64, f64>([](f64 a, f64 b) { return a + b; }));
  ops.add("v_mul_f64", binary<f64, f64, f64>([](f64 a, f64 b) { return a * b; }));
  ops.add("v_fma_f32", ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
  // FMAMK and FMAAK are written with their operands in the order of the formula: a * b + c.
  ops.add({"v_fmamk_f32", "v_fmaak_f32"},
          ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
  ops.add("v_fma_f64", ternary<f64, f64, f64, f64>([](f64 a, f64 b, f64 c) { return std::fma(a, b, c); }));
  ops.add("v_fma_f16", ternary<Half, Half, Half, Half>([](Half a, Half b, Half c) { return fma_half(a, b, c); }));
  ops.add({"v_mad_f32", "v_madmk_f32", "v_madak_f32"},
          ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return a * b + c; }));
  ops.add({"v_max3_f32", "v_max3_num_f32"},
          ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return max_number(max_number(a, b), c); }));
  ops.add({"v_min3_f32", "v_min3_num_f32"},
          ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return min_number(min_number(a, b), c); }));
  // minmax and maxmin (RDNA): (a op b) op' c.
  ops.add({"v_maxmin_f32", "v_maxmin_num_f32"},
          ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return min_number(max_number(a, b), c); }));
  ops.add({"v_minmax_f32", "v_minmax_num_f32"},
          ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return max_number(min_number(a, b), c); }));
  ops.add({"v_med3_f32", "v_med3_num_f32"},
          ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return median(a, b, c); }));
  // IEEE 754-2019 maximum and minimum: a NaN wins.
  ops.add("v_maximum_f32", binary<f32, f32, f32>([](f32 a, f32 b) { return a != a || b != b ? NAN : larger(a, b); }));
  ops.add("v_minimum_f32", binary<f32, f32, f32>([](f32 a, f32 b) { return a != a || b != b ? NAN : smaller(a, b); }));
  ops.add("v_minimum3_f32", ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) {
            return a != a || b != b || c != c ? NAN : smaller(smaller(a, b), c);
          }));
  ops.add("v_maximum3_f32", ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) {
            return a != a || b != b || c != c ? NAN : larger(larger(a, b), c);
          }));
  ops.add({"v_fmac_f32", "v_fmac_dx9_zero_f32"},
          accumulate<f32, f32, f32>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
  ops.add("v_mac_f32", accumulate<f32, f32, f32>([](f32 a, f32 b, f32 c) { return a * b + c; }));
  ops.add("v_fmac_f16", accumulate<Half, Half, Half>([](Half a, Half b, Half c) { return fma_half(a, b, c); }));
  ops.add("v_fmac_f64", accumulate<f64, f64, f64>([](f64 a, f64 b, f64 c) { return std::fma(a, b, c); }));
}

void add_integers(Opcodes& ops) {
  ops.add({"v_add_u32", "v_add_nc_u32", "v_add_i32", "v_add_nc_i32"},
          binary<u32, u32, u32>([](u32 a, u32 b) { return a + b; }));
  ops.add({"v_sub_u32", "v_sub_nc_u32", "v_sub_i32", "v_sub_nc_i32"},
          binary<u32, u32, u32>([](u32 a, u32 b) { return a - b; }));
  ops.add({"v_subrev_u32", "v_subrev_nc_u32"}, binary<u32, u32, u32>([](u32 a, u32 b) { return b - a; }));
  ops.add("v_mul_u32_u24", binary<u32, u32, u32>([](u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }));
  ops.add("v_mul_i32_i24", binary<u32, u32, u32>([](u32 a, u32 b) { return u32(low24(a)) * u32(low24(b)); }));
  ops.add("v_mul_hi_u32_u24",
          binary<u32, u32, u32>([](u32 a, u32 b) { return u32(u64(a & 0xffffff) * (b & 0xffffff) >> 32); }));
  ops.add("v_mul_lo_u32", binary<u32, u32, u32>([](u32 a, u32 b) { return a * b; }));
  ops.add("v_mul_hi_u32", binary<u32, u32, u32>([](u32 a, u32 b) { return u32(u64(a) * b >> 32); }));
  ops.add("v_mul_hi_i32", binary<u32, i32, i32>([](i32 a, i32 b) { return u32(i64(a) * b >> 32); }));
  ops.add("v_max_i32", binary<i32, i32, i32>([](i32 a, i32 b) { return larger(a, b); }));
  ops.add("v_min_i32", binary<i32, i32, i32>([](i32 a, i32 b) { return smaller(a, b); }));
  ops.add("v_max_u32", binary<u32, u32, u32>([](u32 a, u32 b) { return larger(a, b); }));
  ops.add("v_min_u32", binary<u32, u32, u32>([](u32 a, u32 b) { return smaller(a, b); }));
  ops.add({"v_add_u16", "v_add_nc_u16"}, binary<u16, u16, u16>([](u16 a, u16 b) { return u16(a + b); }));
  ops.add({"v_sub_u16", "v_sub_nc_u16"}, binary<u16, u16, u16>([](u16 a, u16 b) { return u16(a - b); }));
  ops.add("v_mul_lo_u16", binary<u16, u16, u16>([](u16 a, u16 b) { return u16(u32(a) * b); }));
  ops.add("v_max_u16", binary<u16, u16, u16>([](u16 a, u16 b) { return larger(a, b); }));
  ops.add("v_min_u16", binary<u16, u16, u16>([](u16 a, u16 b) { return smaller(a, b); }));
  ops.add("v_max_i16", binary<i16, i16, i16>([](i16 a, i16 b) { return larger(a, b); }));
  ops.add("v_min_i16", binary<i16, i16, i16>([](i16 a, i16 b) { return smaller(a, b); }));
  ops.add("v_max3_i32", ternary<i32, i32, i32, i32>([](i32 a, i32 b, i32 c) { return larger(larger(a, b), c); }));
  ops.add("v_min3_i32", ternary<i32, i32, i32, i32>([](i32 a, i32 b, i32 c) { return smaller(smaller(a, b), c); }));
  ops.add("v_med3_i32", ternary<i32, i32, i32, i32>(
                            [](i32 a, i32 b, i32 c) { return larger(smaller(a, b), smaller(larger(a, b), c)); }));
  ops.add("v_maxmin_i32", ternary<i32, i32, i32, i32>([](i32 a, i32 b, i32 c) { return smaller(larger(a, b), c); }));
  ops.add("v_minmax_i32", ternary<i32, i32, i32, i32>([](i32 a, i32 b, i32 c) { return larger(smaller(a, b), c); }));
  ops.add("v_max3_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return larger(larger(a, b), c); }));
  ops.add("v_min3_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return smaller(smaller(a, b), c); }));
  ops.add("v_med3_u32", ternary<u32, u32, u32, u32>(
                            [](u32 a, u32 b, u32 c) { return larger(smaller(a, b), smaller(larger(a, b), c)); }));
  ops.add("v_maxmin_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return smaller(larger(a, b), c); }));
  ops.add("v_minmax_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return larger(smaller(a, b), c); }));
  ops.add("v_add3_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return a + b + c; }));
  ops.add("v_lshl_add_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return (a << (b & 31)) + c; }));
  ops.add("v_add_lshl_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return (a + b) << (c & 31); }));
  ops.add("v_lshl_add_u64", ternary<u64, u64, u32, u64>([](u64 a, u32 b, u64 c) { return (a << (b & 7)) + c; }));
  ops.add("v_mad_u32_u24",
          ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return (a & 0xffffff) * (b & 0xffffff) + c; }));
  ops.add("v_mad_i32_i24",
          ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32(low24(a)) * u32(low24(b)) + c; }));
  ops.add("v_mad_u32_u16", ternary<u32, u16, u16, u32>([](u16 a, u16 b, u32 c) { return u32(a) * b + c; }));
  ops.add({"v_mad_u16", "v_mad_legacy_u16"},
          ternary<u16, u16, u16, u16>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }));
}

void add_bits(Opcodes& ops) {
  ops.add("v_and_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return a & b; }));
  ops.add("v_or_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return a | b; }));
  ops.add("v_xor_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return a ^ b; }));
  ops.add("v_xnor_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return ~(a ^ b); }));
  ops.add("v_and_b16", binary<u16, u16, u16>([](u16 a, u16 b) { return u16(a & b); }));
  ops.add("v_or_b16", binary<u16, u16, u16>([](u16 a, u16 b) { return u16(a | b); }));
  ops.add("v_xor_b16", binary<u16, u16, u16>([](u16 a, u16 b) { return u16(a ^ b); }));
  // "Reversed" shifts: the first source is the amount.
  ops.add("v_lshlrev_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return b << (a & 31); }));
  ops.add("v_lshrrev_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return b >> (a & 31); }));
  ops.add("v_ashrrev_i32", binary<i32, u32, i32>([](u32 a, i32 b) { return b >> (a & 31); }));
  ops.add("v_lshlrev_b64", binary<u64, u32, u64>([](u32 a, u64 b) { return b << (a & 63); }));
  ops.add("v_lshrrev_b64", binary<u64, u32, u64>([](u32 a, u64 b) { return b >> (a & 63); }));
  ops.add("v_ashrrev_i64", binary<i64, u32, i64>([](u32 a, i64 b) { return b >> (a & 63); }));
  ops.add("v_lshlrev_b16", binary<u16, u16, u16>([](u16 a, u16 b) { return u16(b << (a & 15)); }));
  ops.add("v_lshrrev_b16", binary<u16, u16, u16>([](u16 a, u16 b) { return u16(b >> (a & 15)); }));
  ops.add("v_ashrrev_i16", binary<i16, u16, i16>([](u16 a, i16 b) { return i16(b >> (a & 15)); }));
  ops.add({"v_ffbh_u32", "v_clz_i32_u32"}, unary<u32, u32>([](u32 a) { return a ? u32(__builtin_clz(a)) : ~0u; }));
  ops.add({"v_ffbl_b32", "v_ctz_i32_b32"}, unary<u32, u32>([](u32 a) { return a ? u32(__builtin_ctz(a)) : ~0u; }));
  ops.add("v_bfm_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); }));
  ops.add("v_bcnt_u32_b32", binary<u32, u32, u32>([](u32 a, u32 b) { return u32(__builtin_popcount(a)) + b; }));
  ops.add("v_lshl_or_b32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return a << (b & 31) | c; }));
  ops.add("v_and_or_b32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return (a & b) | c; }));
  ops.add("v_or3_b32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return a | b | c; }));
  ops.add("v_xor3_b32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return a ^ b ^ c; }));
  ops.add("v_xad_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return (a ^ b) + c; }));
  ops.add("v_bfe_u32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
            u32 width = c & 31;
            return width == 0 ? 0 : a >> (b & 31) & ((1u << width) - 1);
          }));
  ops.add("v_bfe_i32",
          ternary<i32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return signed_field(i32(a), b & 31, c & 31); }));
  ops.add("v_bfi_b32", ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return (a & b) | (~a & c); }));
  ops.add("v_alignbit_b32",
          ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32((u64(a) << 32 | b) >> (c & 31)); }));
  ops.add("v_alignbyte_b32",
          ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32((u64(a) << 32 | b) >> (c & 3) * 8); }));
  ops.add("v_perm_b32",
          ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_bytes(u64(a) << 32 | b, c); }));
}

}  // namespace

void add_vector(Opcodes& ops) {
  add_conversions(ops);
  add_float_functions(ops);
  add_integers(ops);
  add_bits(ops);
}
