// Packed math (VOP3P): two 16-bit or two 32-bit values per lane, and mixed-precision FMA. AMD CDNA3 ISA 12.10.
//
// op_sel picks, per source, the half that the low result uses, op_sel_hi that of the high result.
#include "operands.h"

namespace {

template <class T>
void read_halves(Wave& w, const Instruction& i, int k, T* low, T* high) {
  const Operand& o = i.src[k];
  u32 t[kLanes];
  if (o.kind == kVector) {
    std::memcpy(t, w.v[o.index], sizeof(t));
  } else {
    u32 x = o.kind == kReal ? float_to_half(f32(o.real)) : read_scalar(w, o);
    for (int l = 0; l < kLanes; l++) t[l] = x;
  }
  u32 low_shift = bit(i.op_sel, k) ? 16 : 0, high_shift = bit(i.op_sel_hi, k) ? 16 : 0;
  u16 low_flip = is_float<T> && bit(i.neg_lo, k) ? 0x8000 : 0, high_flip = is_float<T> && bit(i.neg_hi, k) ? 0x8000 : 0;
  for (int l = 0; l < kLanes; l++) {
    low[l] = bits<T>(u16(u16(t[l] >> low_shift) ^ low_flip));
    high[l] = bits<T>(u16(u16(t[l] >> high_shift) ^ high_flip));
  }
}

template <class T, int Sources, class F>
Handler packed16(F) {
  return [](Wave& w, const Instruction& i) {
    T low[3][kLanes], high[3][kLanes];
    for (int k = 0; k < 3; k++) read_halves(w, i, k < Sources ? k : 0, low[k], high[k]);
    u32 r[kLanes];
    for (int l = 0; l < kLanes; l++) {
      T a = F{}(low[0][l], low[1][l], low[2][l]), b = F{}(high[0][l], high[1][l], high[2][l]);
      r[l] = pack(bits<u16>(a), bits<u16>(b));
    }
    write_register(w, i.dst.index, r, w.exec());
  };
}

void read_word(Wave& w, const Instruction& i, int k, bool upper, bool negate, f32* out) {
  const Operand& o = i.src[k];
  u32 t[kLanes];
  if (o.kind == kVector) {
    std::memcpy(t, w.v[o.index + upper], sizeof(t));
  } else {
    u32 x = o.kind == kScalar ? w.s[o.index + upper] : read_scalar(w, o);
    for (int l = 0; l < kLanes; l++) t[l] = x;
  }
  if (negate)
    for (int l = 0; l < kLanes; l++) t[l] ^= 0x80000000;
  std::memcpy(out, t, sizeof(t));
}

template <int Sources, class F>
Handler packed32(F) {
  return [](Wave& w, const Instruction& i) {
    f32 a[3][kLanes], r[2][kLanes];
    for (int half = 0; half < 2; half++) {
      for (int k = 0; k < Sources; k++)
        read_word(w, i, k, bit(half ? i.op_sel_hi : i.op_sel, k), bit(half ? i.neg_hi : i.neg_lo, k), a[k]);
      for (int l = 0; l < kLanes; l++) r[half][l] = F{}(a[0][l], a[1][l], Sources > 2 ? a[2][l] : 0.f);
    }
    for (int half = 0; half < 2; half++) {
      u32 t[kLanes];
      std::memcpy(t, r[half], sizeof(t));
      write_register(w, i.dst.index + half, t, w.exec());
    }
  };
}

// V_PK_MOV_B32: the low result from source 0, the high one from source 1; op_sel says which word of each.
void packed_move(Wave& w, const Instruction& i) {
  f32 a[2][kLanes];
  for (int k = 0; k < 2; k++) read_word(w, i, k, bit(i.op_sel, k), false, a[k]);
  for (int k = 0; k < 2; k++) {
    u32 t[kLanes];
    std::memcpy(t, a[k], sizeof(t));
    write_register(w, i.dst.index + k, t, w.exec());
  }
}

// Mixed FMA: op_sel_hi says per source whether it is a half, op_sel then which one.
void read_mixed(Wave& w, const Instruction& i, int k, f32* out) {
  const Operand& o = i.src[k];
  bool is_half = bit(i.op_sel_hi, k);
  u32 t[kLanes];
  if (o.kind == kVector) {
    std::memcpy(t, w.v[o.index], sizeof(t));
  } else {
    u32 x = o.kind == kReal && is_half ? float_to_half(f32(o.real)) : read_scalar(w, o);
    for (int l = 0; l < kLanes; l++) t[l] = x;
  }
  u32 shift = bit(i.op_sel, k) ? 16 : 0;
  for (int l = 0; l < kLanes; l++) {
    f32 x = is_half ? half_to_float(u16(t[l] >> shift)) : bits<f32>(t[l]);
    if (o.absolute) x = std::fabs(x);
    out[l] = o.negate ? -x : x;
  }
}

enum MixResult { kFloat, kLowHalf, kHighHalf };

template <MixResult Result>
void mixed_fma(Wave& w, const Instruction& i) {
  f32 a[3][kLanes];
  for (int k = 0; k < 3; k++) read_mixed(w, i, k, a[k]);
  u32 r[kLanes];
  for (int l = 0; l < kLanes; l++) {
    f32 x = std::fma(a[0][l], a[1][l], a[2][l]);
    if (i.clamp) x = clamp01(x);
    u32 old = w.v[i.dst.index][l];
    if (Result == kFloat) r[l] = bits<u32>(x);
    else if (Result == kLowHalf) r[l] = float_to_half(x) | (old & 0xffff0000);
    else r[l] = u32(float_to_half(x)) << 16 | (old & 0xffff);
  }
  write_register(w, i.dst.index, r, w.exec());
}

}  // namespace

void add_vector_packed(Opcodes& ops) {
  ops.add("v_pk_add_f16", packed16<Half, 2>([](Half a, Half b, Half) { return Half(f32(a) + f32(b)); }));
  ops.add("v_pk_mul_f16", packed16<Half, 2>([](Half a, Half b, Half) { return Half(f32(a) * f32(b)); }));
  ops.add({"v_pk_max_f16", "v_pk_max_num_f16"},
          packed16<Half, 2>([](Half a, Half b, Half) { return Half(max_number(a, b)); }));
  ops.add({"v_pk_min_f16", "v_pk_min_num_f16"},
          packed16<Half, 2>([](Half a, Half b, Half) { return Half(min_number(a, b)); }));
  ops.add("v_pk_fma_f16", packed16<Half, 3>([](Half a, Half b, Half c) {
            return bits<Half>(double_to_half(std::fma(f64(f32(a)), f64(f32(b)), f64(f32(c)))));
          }));
  ops.add({"v_pk_add_u16", "v_pk_add_i16"}, packed16<u16, 2>([](u16 a, u16 b, u16) { return u16(a + b); }));
  ops.add({"v_pk_sub_u16", "v_pk_sub_i16"}, packed16<u16, 2>([](u16 a, u16 b, u16) { return u16(a - b); }));
  ops.add("v_pk_mul_lo_u16", packed16<u16, 2>([](u16 a, u16 b, u16) { return u16(u32(a) * b); }));
  ops.add("v_pk_mad_u16", packed16<u16, 3>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }));
  ops.add("v_pk_lshlrev_b16", packed16<u16, 2>([](u16 a, u16 b, u16) { return u16(b << (a & 15)); }));
  ops.add("v_pk_lshrrev_b16", packed16<u16, 2>([](u16 a, u16 b, u16) { return u16(b >> (a & 15)); }));
  ops.add("v_pk_max_u16", packed16<u16, 2>([](u16 a, u16 b, u16) { return larger(a, b); }));
  ops.add("v_pk_min_u16", packed16<u16, 2>([](u16 a, u16 b, u16) { return smaller(a, b); }));
  ops.add("v_pk_max_i16", packed16<i16, 2>([](i16 a, i16 b, i16) { return larger(a, b); }));
  ops.add("v_pk_min_i16", packed16<i16, 2>([](i16 a, i16 b, i16) { return smaller(a, b); }));
  ops.add("v_pk_add_f32", packed32<2>([](f32 a, f32 b, f32) { return a + b; }));
  ops.add("v_pk_mul_f32", packed32<2>([](f32 a, f32 b, f32) { return a * b; }));
  ops.add("v_pk_fma_f32", packed32<3>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
  ops.add("v_pk_mov_b32", packed_move);
  ops.add({"v_fma_mix_f32", "v_mad_mix_f32"}, mixed_fma<kFloat>);
  ops.add({"v_fma_mixlo_f16", "v_mad_mixlo_f16"}, mixed_fma<kLowHalf>);
  ops.add({"v_fma_mixhi_f16", "v_mad_mixhi_f16"}, mixed_fma<kHighHalf>);
}
