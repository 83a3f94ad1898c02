// Vector instructions with more than one result or an implied operand: selects, carries, division steps, wide products,
// dot products. AMD CDNA3 ISA 12.8 and 12.11.
#include "lanewise.h"

namespace {

// V_CNDMASK: the second source where the mask is set. Its negate and absolute modifiers act on the bits.
void conditional_mask(Wave& w, const Instruction& i) {
  u32 a[kLanes], b[kLanes], r[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  for (int k = 0; k < 2; k++) {
    u32* x = k ? b : a;
    if (i.src[k].absolute)
      for (int l = 0; l < kLanes; l++) x[l] &= 0x7fffffff;
    if (i.src[k].negate)
      for (int l = 0; l < kLanes; l++) x[l] ^= 0x80000000;
  }
  u64 mask = read_condition(w, i);
  for (int l = 0; l < kLanes; l++) r[l] = bit(mask, l) ? b[l] : a[l];
  write(w, i, r);
}

void conditional_mask16(Wave& w, const Instruction& i) {
  u16 a[kLanes], b[kLanes], r[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  u64 mask = read_condition(w, i);
  for (int l = 0; l < kLanes; l++) r[l] = bit(mask, l) ? b[l] : a[l];
  write(w, i, r);
}

// f(a, b, carry in, carry out&) per lane; carries are lane masks.
template <class F>
Handler carry(F) {
  return [](Wave& w, const Instruction& i) {
    u32 a[kLanes], b[kLanes], r[kLanes];
    read(w, i, 0, a);
    read(w, i, 1, b);
    u64 in = read_condition(w, i), out = 0;
    for (int l = 0; l < kLanes; l++) {
      bool carry_out = false;
      r[l] = F{}(a[l], b[l], u32(bit(in, l)), carry_out);
      out |= u64(carry_out) << l;
    }
    u64 exec = w.exec();
    write(w, i, r);
    write_mask(w, i.dst2, out & exec);
  };
}

template <class S, class D>
void multiply_add_wide(Wave& w, const Instruction& i) {
  S a[kLanes], b[kLanes];
  D c[kLanes], r[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  read(w, i, 2, c);
  u64 out = 0;
  for (int l = 0; l < kLanes; l++) {
    u64 product = u64(D(a[l]) * D(b[l])), sum = product + u64(c[l]);
    r[l] = D(sum);
    bool overflow = std::is_signed_v<D> ? ((i64(product) ^ i64(sum)) & (i64(c[l]) ^ i64(sum))) < 0 : sum < product;
    out |= u64(overflow) << l;
  }
  u64 exec = w.exec();
  write(w, i, r);
  write_mask(w, i.dst2, out & exec);
}

// V_DIV_SCALE, V_DIV_FMAS and V_DIV_FIXUP: the steps of a correctly rounded division, from the ISA's pseudo code.
bool is_subnormal(f64 x) {
  x = std::fabs(x);
  return x != 0 && x < 1.1754943508222875e-38;
}

f32 division_scale(f32 chosen, f32 denominator, f32 numerator, bool& scaled) {
  f64 reciprocal = 1.0 / f64(denominator), quotient = f64(numerator) / f64(denominator);
  scaled = false;
  if (numerator == 0 || denominator == 0) return NAN;
  if (exponent_field(numerator) - exponent_field(denominator) >= 96) {
    scaled = true;
    return chosen == denominator ? std::ldexp(chosen, 64) : chosen;
  }
  if (is_subnormal(denominator)) return std::ldexp(chosen, 64);
  if (is_subnormal(reciprocal) && is_subnormal(quotient)) {
    scaled = true;
    return chosen == denominator ? std::ldexp(chosen, 64) : chosen;
  }
  if (is_subnormal(reciprocal)) return std::ldexp(chosen, -64);
  if (is_subnormal(quotient)) {
    scaled = true;
    return chosen == numerator ? std::ldexp(chosen, 64) : chosen;
  }
  if (exponent_field(numerator) <= 23) return std::ldexp(chosen, 64);
  return chosen;
}

void divide_scale(Wave& w, const Instruction& i) {
  f32 a[kLanes], b[kLanes], c[kLanes], r[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  read(w, i, 2, c);
  u64 mask = 0, exec = w.exec();
  for (int l = 0; l < kLanes; l++) {
    bool scaled;
    r[l] = division_scale(a[l], b[l], c[l], scaled);
    mask |= u64(scaled) << l;
  }
  write(w, i, r);
  write_mask(w, i.dst2, mask & exec);
}

void divide_fma(Wave& w, const Instruction& i) {
  f32 a[kLanes], b[kLanes], c[kLanes], r[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  read(w, i, 2, c);
  u64 mask = w.vcc();
  for (int l = 0; l < kLanes; l++) {
    r[l] = std::fma(a[l], b[l], c[l]);
    if (bit(mask, l)) r[l] = std::ldexp(r[l], exponent_field(c[l]) > 127 ? 64 : -64);
  }
  write(w, i, r);
}

f32 division_fixup(f32 quotient, f32 denominator, f32 numerator) {
  bool negative = std::signbit(denominator) != std::signbit(numerator);
  if (numerator != numerator) return numerator;
  if (denominator != denominator) return denominator;
  if (denominator == 0 && numerator == 0) return NAN;
  if (std::isinf(denominator) && std::isinf(numerator)) return NAN;
  if (denominator == 0 || std::isinf(numerator)) return negative ? -INFINITY : INFINITY;
  if (std::isinf(denominator) || numerator == 0) return negative ? -0.f : 0.f;
  return std::copysign(quotient, negative ? -1.f : 1.f);
}

// Any function of three bits, given as its truth table.
template <class T>
void bit_operation(Wave& w, const Instruction& i) {
  T a[kLanes], b[kLanes], c[kLanes], r[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  read(w, i, 2, c);
  for (int l = 0; l < kLanes; l++) {
    T x = 0;
    for (int k = 0; k < 8; k++)
      if (i.bitop >> k & 1) x |= T((k & 4 ? a[l] : T(~a[l])) & (k & 2 ? b[l] : T(~b[l])) & (k & 1 ? c[l] : T(~c[l])));
    r[l] = x;
  }
  write(w, i, r);
}

f32 dot_f16(u32 a, u32 b, f32 c) {
  return half_to_float(u16(a)) * half_to_float(u16(b)) + half_to_float(a >> 16) * half_to_float(b >> 16) + c;
}

f32 dot_bf16(u32 a, u32 b, f32 c) {
  return bfloat_to_float(a & 0xffff) * bfloat_to_float(b & 0xffff) +
         bfloat_to_float(a >> 16) * bfloat_to_float(b >> 16) + c;
}

}  // namespace

void add_vector_special(Opcodes& ops) {
  ops.add("v_cndmask_b32", conditional_mask);
  ops.add("v_cndmask_b16", conditional_mask16);
  ops.add("v_add_co_u32", carry([](u32 a, u32 b, u32, bool& out) {
            out = u64(a) + b >> 32;
            return a + b;
          }));
  ops.add({"v_addc_co_u32", "v_add_co_ci_u32"}, carry([](u32 a, u32 b, u32 in, bool& out) {
            out = u64(a) + b + in >> 32;
            return a + b + in;
          }));
  ops.add("v_sub_co_u32", carry([](u32 a, u32 b, u32, bool& out) {
            out = b > a;
            return a - b;
          }));
  ops.add("v_subrev_co_u32", carry([](u32 a, u32 b, u32, bool& out) {
            out = a > b;
            return b - a;
          }));
  ops.add({"v_subb_co_u32", "v_sub_co_ci_u32"}, carry([](u32 a, u32 b, u32 in, bool& out) {
            out = u64(b) + in > a;
            return a - b - in;
          }));
  ops.add({"v_subbrev_co_u32", "v_subrev_co_ci_u32"}, carry([](u32 a, u32 b, u32 in, bool& out) {
            out = u64(a) + in > b;
            return b - a - in;
          }));
  ops.add({"v_mad_u64_u32", "v_mad_co_u64_u32"}, multiply_add_wide<u32, u64>);
  ops.add({"v_mad_i64_i32", "v_mad_co_i64_i32"}, multiply_add_wide<i32, i64>);
  ops.add("v_div_scale_f32", divide_scale);
  ops.add("v_div_fmas_f32", divide_fma);
  ops.add("v_div_fixup_f32", ternary<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return division_fixup(a, b, c); }));
  ops.add("v_bitop3_b32", bit_operation<u32>);
  ops.add("v_bitop3_b16", bit_operation<u16>);
  ops.add("v_dot2_f32_f16", ternary<f32, u32, u32, f32>([](u32 a, u32 b, f32 c) { return dot_f16(a, b, c); }));
  ops.add("v_dot2_f32_bf16", ternary<f32, u32, u32, f32>([](u32 a, u32 b, f32 c) { return dot_bf16(a, b, c); }));
  ops.add({"v_dot2acc_f32_f16", "v_dot2c_f32_f16"},
          accumulate<f32, u32, u32>([](u32 a, u32 b, f32 c) { return dot_f16(a, b, c); }));
  ops.add("v_dot2c_f32_bf16", accumulate<f32, u32, u32>([](u32 a, u32 b, f32 c) { return dot_bf16(a, b, c); }));
}
