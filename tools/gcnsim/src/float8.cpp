// Conversions from and to fp8 (e4m3) and bf8 (e5m2). AMD CDNA3 ISA 12.8 (fnuz formats), CDNA4 ISA (OCP, scaled forms).
#include "operands.h"

namespace {

Fp8 format(const Wave& w, bool e5m2) { return fp8_format(e5m2, w.gfx < 0x950); }

void write_pair16(Wave& w, const Instruction& i, const u32* packed) {
  bool high = bit(i.op_sel, 3);
  u32 r[kLanes];
  for (int l = 0; l < kLanes; l++) {
    u32 old = w.v[i.dst.index][l];
    r[l] = high ? (old & 0xffff) | packed[l] << 16 : (old & 0xffff0000) | packed[l];
  }
  write_register(w, i.dst.index, r, w.exec());
}

// Two floats to two bytes, into the low or high half of the destination.
template <bool E5m2>
void pack_from_float(Wave& w, const Instruction& i) {
  f32 a[kLanes], b[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  u32 r[kLanes];
  Fp8 to = format(w, E5m2);
  for (int l = 0; l < kLanes; l++) r[l] = float_to_fp8(a[l], to, i.clamp) | float_to_fp8(b[l], to, i.clamp) << 8;
  write_pair16(w, i, r);
}

// `Count` bytes of the source to as many floats.
template <bool E5m2, int Count>
void to_float(Wave& w, const Instruction& i) {
  u32 a[kLanes], r[kLanes];
  read(w, i, 0, a);
  u32 shift = i.sdwa ? 0 : Count == 2 ? (i.op_sel & 1) * 16 : (i.op_sel & 3) * 8;
  Fp8 from = format(w, E5m2);
  for (int k = 0; k < Count; k++) {
    for (int l = 0; l < kLanes; l++) r[l] = bits<u32>(fp8_to_float(a[l] >> (shift + 8 * k) & 255, from));
    write_register(w, i.dst.index + k, r, w.exec());
  }
}

enum Wide { kF16, kBf16, kF32 };

// gfx950: two bytes times a scale, to a wider type.
template <bool E5m2, Wide To>
void scaled_unpack(Wave& w, const Instruction& i) {
  u32 a[kLanes], r[2][kLanes];
  f32 scale[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, scale);
  u32 shift = bit(i.op_sel, 0) ? 16 : 0;
  Fp8 from = format(w, E5m2);
  for (int l = 0; l < kLanes; l++) {
    f32 x = fp8_to_float(a[l] >> shift & 255, from) * scale[l],
        y = fp8_to_float(a[l] >> (shift + 8) & 255, from) * scale[l];
    r[0][l] = To == kF32   ? bits<u32>(x)
              : To == kF16 ? pack(float_to_half(x), float_to_half(y))
                           : pack(float_to_bfloat(x), float_to_bfloat(y));
    r[1][l] = bits<u32>(y);
  }
  write_register(w, i.dst.index, r[0], w.exec());
  if (To == kF32) write_register(w, i.dst.index + 1, r[1], w.exec());
}

// gfx950: two wide values divided by a scale, to two bytes; always saturates.
template <bool E5m2, Wide From>
void scaled_pack(Wave& w, const Instruction& i) {
  f32 x[kLanes], y[kLanes], scale[kLanes];
  if (From == kF32) {
    read(w, i, 0, x);
    read(w, i, 1, y);
    read(w, i, 2, scale);
  } else {
    u32 a[kLanes];
    read(w, i, 0, a);
    read(w, i, 1, scale);
    for (int l = 0; l < kLanes; l++) {
      x[l] = From == kF16 ? half_to_float(u16(a[l])) : bfloat_to_float(a[l] & 0xffff);
      y[l] = From == kF16 ? half_to_float(u16(a[l] >> 16)) : bfloat_to_float(a[l] >> 16);
    }
  }
  u32 r[kLanes];
  Fp8 to = format(w, E5m2);
  for (int l = 0; l < kLanes; l++)
    r[l] = float_to_fp8(x[l] / scale[l], to, true) | float_to_fp8(y[l] / scale[l], to, true) << 8;
  write_pair16(w, i, r);
}

}  // namespace

void add_float8(Opcodes& ops) {
  ops.add("v_cvt_pk_fp8_f32", pack_from_float<false>);
  ops.add("v_cvt_pk_bf8_f32", pack_from_float<true>);
  ops.add("v_cvt_f32_fp8", to_float<false, 1>);
  ops.add("v_cvt_f32_bf8", to_float<true, 1>);
  ops.add("v_cvt_pk_f32_fp8", to_float<false, 2>);
  ops.add("v_cvt_pk_f32_bf8", to_float<true, 2>);
  ops.add("v_cvt_scalef32_pk_f16_fp8", scaled_unpack<false, kF16>);
  ops.add("v_cvt_scalef32_pk_bf16_fp8", scaled_unpack<false, kBf16>);
  ops.add("v_cvt_scalef32_pk_f32_fp8", scaled_unpack<false, kF32>);
  ops.add("v_cvt_scalef32_pk_f16_bf8", scaled_unpack<true, kF16>);
  ops.add("v_cvt_scalef32_pk_bf16_bf8", scaled_unpack<true, kBf16>);
  ops.add("v_cvt_scalef32_pk_f32_bf8", scaled_unpack<true, kF32>);
  ops.add("v_cvt_scalef32_pk_fp8_f16", scaled_pack<false, kF16>);
  ops.add("v_cvt_scalef32_pk_fp8_bf16", scaled_pack<false, kBf16>);
  ops.add("v_cvt_scalef32_pk_fp8_f32", scaled_pack<false, kF32>);
  ops.add("v_cvt_scalef32_pk_bf8_f16", scaled_pack<true, kF16>);
  ops.add("v_cvt_scalef32_pk_bf8_bf16", scaled_pack<true, kBf16>);
  ops.add("v_cvt_scalef32_pk_bf8_f32", scaled_pack<true, kF32>);
}
