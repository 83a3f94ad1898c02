// Number formats that C++ lacks (fp16, bf16, fp8, xf32), and AMD's rules for minimum, maximum and conversion.
//
// Conversions are written out, so that any C++20 compiler builds this; with F16C (x86-64 since 2012) fp16 uses the
// processor's own, which round the same way. tests/gcnsim compares them with numpy.
#pragma once

#include <cmath>
#include <type_traits>

#include "types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

constexpr f32 kSmallestNormal = 1.17549435e-38f;

// ---- fp16

inline f32 half_to_float(u16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  u32 sign = u32(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits<f32>(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
  if (exponent == 0) return bits<f32>(sign | bits<u32>(f32(mantissa) * 5.9604644775390625e-8f));
  return bits<f32>(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

// Round to nearest even; a NaN keeps the top bits of its payload and becomes quiet.
inline u16 float_to_half(f32 x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  u32 b = bits<u32>(x), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00 | (magnitude >> 13 & 0x1ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000)  // subnormal: let the addition of 0.5 round at the 24th bit below one
    return sign | u16(bits<u32>(bits<f32>(magnitude) + 0.5f) - bits<u32>(0.5f));
  return sign | u16((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

// Through a float that is rounded to odd, which makes the second rounding exact (Boldo and Melquiond, 2008).
inline u16 double_to_half(f64 x) {
  f32 f = f32(x);
  if (f64(f) != x && std::isfinite(f) && x == x) {
    u32 b = bits<u32>(f);
    if (std::fabs(f64(f)) > std::fabs(x)) b--;
    f = bits<f32>(b | 1);
  }
  return float_to_half(f);
}

// Round towards zero, as V_CVT_PKRTZ_F16_F32.
inline u16 float_to_half_toward_zero(f32 x) {
  u16 h = float_to_half(x);
  return !std::isinf(x) && std::fabs(half_to_float(h)) > std::fabs(x) ? h - 1 : h;
}

struct Half {
  u16 raw;
  Half() = default;
  explicit Half(f32 x) : raw(float_to_half(x)) {}
  operator f32() const { return half_to_float(raw); }
};

inline void halves_to_floats(const u16* in, f32* out, int count) {
  int done = 0;
#if defined(__F16C__) && defined(__AVX__)
  for (; done + 8 <= count; done += 8)
    _mm256_storeu_ps(out + done, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + done))));
#endif
  for (; done < count; done++) out[done] = half_to_float(in[done]);
}

// ---- bf16

inline f32 bfloat_to_float(u32 b) { return bits<f32>(b << 16); }

inline u16 float_to_bfloat(f32 x) {
  u32 b = bits<u32>(x);
  if (x != x) return b >> 16 | 0x40;
  return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

inline u32 pack(u16 low, u16 high) { return u32(low) | u32(high) << 16; }

// ---- xf32: float with 10 bits of mantissa. How the hardware rounds its operands is not documented; nearest even here.

inline f32 round_to_xf32(f32 x) {
  u32 b = bits<u32>(x);
  return bits<f32>((b + 0xfff + (b >> 13 & 1)) & ~0x1fffu);
}

// ---- fp8: e4m3 and e5m2, of OCP ("ocp", gfx950 and gfx12) or with one zero and one NaN ("fnuz", gfx942)

struct Fp8 {
  int exponent_bits, bias;
  bool fnuz;
  f32 largest;
  int mantissa_bits() const { return 7 - exponent_bits; }
};

inline Fp8 fp8_format(bool e5m2, bool fnuz) {
  if (e5m2) return {5, fnuz ? 16 : 15, fnuz, 57344.f};
  return {4, fnuz ? 8 : 7, fnuz, fnuz ? 240.f : 448.f};
}

inline f32 fp8_to_float(u32 b, Fp8 format) {
  u32 sign = b >> 7 & 1;
  b &= 127;
  int mantissa_bits = format.mantissa_bits(), exponent = b >> mantissa_bits, mantissa = b & ((1 << mantissa_bits) - 1);
  f32 value;
  if (format.fnuz && sign && !b) return NAN;
  if (!format.fnuz && format.exponent_bits == 5 && exponent == 31) value = mantissa ? NAN : INFINITY;
  else if (!format.fnuz && format.exponent_bits == 4 && b == 127) value = NAN;
  else if (exponent) value = std::ldexp(1.f + f32(mantissa) / (1 << mantissa_bits), exponent - format.bias);
  else value = std::ldexp(f32(mantissa) / (1 << mantissa_bits), 1 - format.bias);
  return sign ? -value : value;
}

// Round to nearest even; what is too large saturates if `clamp`, else becomes infinity or NaN.
inline u32 float_to_fp8(f32 x, Fp8 format, bool clamp) {
  u32 sign = bits<u32>(x) >> 31 << 7;
  bool e5m2 = format.exponent_bits == 5;
  if (x != x) return format.fnuz ? 0x80 : sign | 0x7f;
  f32 magnitude = std::fabs(x);
  if (magnitude == 0) return format.fnuz ? 0 : sign;
  int exponent, mantissa_bits = format.mantissa_bits();
  std::frexp(magnitude, &exponent);
  exponent = larger(exponent - 1, 1 - format.bias);
  f32 unit = std::ldexp(1.f, exponent - mantissa_bits);
  f32 rounded = std::nearbyint(magnitude / unit) * unit;
  if (rounded > format.largest || std::isinf(x)) {
    if (clamp) return sign | (e5m2 && !format.fnuz ? 0x7b : format.fnuz ? 0x7f : 0x7e);
    return format.fnuz ? 0x80 : e5m2 ? sign | 0x7c : sign | 0x7f;
  }
  if (rounded == 0) return format.fnuz ? 0 : sign;
  std::frexp(rounded, &exponent);
  exponent = larger(exponent - 1, 1 - format.bias);
  u32 steps = u32(rounded / std::ldexp(1.f, exponent - mantissa_bits)), one = 1u << mantissa_bits;
  return sign | (steps >= one ? u32(exponent + format.bias) << mantissa_bits | (steps & (one - 1)) : steps);
}

// ---- rules of the vector and scalar ALU

// IEEE 754-2008 minNum and maxNum: the number wins over the NaN.
inline f32 min_number(f32 a, f32 b) { return a != a ? b : b != b ? a : a < b ? a : b; }
inline f32 max_number(f32 a, f32 b) { return a != a ? b : b != b ? a : a > b ? a : b; }

inline u32 saturate_u32(f32 a) { return !(a > 0) ? 0u : a >= 4294967296.f ? 0xffffffffu : u32(a); }

inline i32 saturate_i32(f32 a) {
  return a != a ? 0 : a >= 2147483648.f ? 0x7fffffff : a <= -2147483648.f ? i32(0x80000000) : i32(a);
}

inline f32 flush(f32 x) { return std::fabs(x) < kSmallestNormal ? std::copysign(0.f, x) : x; }

inline f32 clamp01(f32 x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }

inline int exponent_field(f32 x) { return bits<u32>(x) >> 23 & 255; }

// Bits offset to offset + width - 1, sign extended; beyond the top bit, the sign.
template <class T>
inline T signed_field(T x, u32 offset, u32 width) {
  u32 unused = sizeof(T) * 8 - smaller(width, u32(sizeof(T) * 8));
  using Unsigned = std::make_unsigned_t<T>;
  return width == 0 ? 0 : T(Unsigned(x >> offset) << unused) >> unused;
}

inline u32 reverse_bits(u32 x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(x);
}
