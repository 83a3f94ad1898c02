// Matrix instructions: MFMA (CDNA) and WMMA (RDNA). AMD CDNA3 ISA chapter 7; AMD matrix instruction calculator.
//
// MFMA, M x M result, K deep, one block: lane l holds row (A) or column (B) l % M and K / G consecutive k, G = 64 / M
// groups of lanes. Register r of the result holds column l % M; its row is 8 (r / 4) + 4 (l / M) + r % 4, which for
// M = 16 is 4 (l / 16) + r.
//
// The products are summed in float32 in the order of k; hardware's order and intermediate width are not documented.
// gfx90a takes subnormal fp16 and bf16 operands as zero (PyTorch's notes on numerical accuracy, MI200), and so do we.
#include <cstdio>

#include "operands.h"

namespace {

enum Type { kF16, kBf16, kF32, kXf32, kFp8, kBf8, kI8 };

template <Type T>
constexpr int per_register = T == kF32 || T == kXf32   ? 1
                             : T == kF16 || T == kBf16 ? 2
                                                       : 4;

// Element e of every lane's operand, as float.
template <Type T>
inline void load_element(const Wave& w, u32 base, int e, f32* out) {
  const u32* from = w.v[base + e / per_register<T>];
  if constexpr (T == kF16) {
    u16 t[kLanes];
    for (int l = 0; l < kLanes; l++) t[l] = u16(from[l] >> (e & 1) * 16);
    if (w.gfx == 0x90a)
      for (int l = 0; l < kLanes; l++) t[l] = t[l] & 0x7c00 ? t[l] : t[l] & 0x8000;
    halves_to_floats(t, out, kLanes);
  } else if constexpr (T == kBf16) {
    for (int l = 0; l < kLanes; l++) out[l] = bfloat_to_float(from[l] >> (e & 1) * 16 & 0xffff);
    if (w.gfx == 0x90a)
      for (int l = 0; l < kLanes; l++) out[l] = flush(out[l]);
  } else if constexpr (T == kF32) {
    std::memcpy(out, from, kLanes * sizeof(f32));
  } else if constexpr (T == kXf32) {
    for (int l = 0; l < kLanes; l++) out[l] = round_to_xf32(bits<f32>(from[l]));
  } else {
    Fp8 format = fp8_format(T == kBf8, w.gfx < 0x950);
    for (int l = 0; l < kLanes; l++) out[l] = fp8_to_float(from[l] >> (e & 3) * 8 & 255, format);
  }
}

f32 uniform_accumulator(Wave& w, const Operand& c) { return bits<f32>(read_scalar(w, c)); }

constexpr int result_row(int r, int group) { return 8 * (r / 4) + 4 * group + r % 4; }

template <int M, int K, Type A, Type B>
void mfma(Wave& w, const Instruction& i) {
  constexpr int groups = kLanes / M, per_lane = K / groups, registers = M * M / kLanes;
  f32 a[K][M], b[K][M], d[M][M], lanes[kLanes];
  for (int e = 0; e < per_lane; e++) {
    load_element<A>(w, i.src[0].index, e, lanes);
    for (int g = 0; g < groups; g++) std::memcpy(a[g * per_lane + e], lanes + g * M, sizeof(a[0]));
    load_element<B>(w, i.src[1].index, e, lanes);
    for (int g = 0; g < groups; g++) std::memcpy(b[g * per_lane + e], lanes + g * M, sizeof(b[0]));
  }
  const Operand& c = i.src[2];
  for (int r = 0; r < registers; r++)
    for (int g = 0; g < groups; g++) {
      f32* row = d[M == 32 ? result_row(r, g) : 4 * g + r];
      if (c.kind == kVector) std::memcpy(row, &w.v[c.index + r][g * M], sizeof(d[0]));
      else
        for (int n = 0; n < M; n++) row[n] = uniform_accumulator(w, c);
    }
  for (int m = 0; m < M; m++) {
    f32 sum[M];
    std::memcpy(sum, d[m], sizeof(sum));
    for (int k = 0; k < K; k++)
      for (int n = 0; n < M; n++) sum[n] = std::fma(a[k][m], b[k][n], sum[n]);
    std::memcpy(d[m], sum, sizeof(sum));
  }
  for (int r = 0; r < registers; r++)
    for (int g = 0; g < groups; g++)
      std::memcpy(&w.v[i.dst.index + r][g * M], d[M == 32 ? result_row(r, g) : 4 * g + r], sizeof(d[0]));
}

template <int M, int K>
void mfma_i8(Wave& w, const Instruction& i) {
  constexpr int groups = kLanes / M, per_lane = K / groups, registers = M * M / kLanes;
  i32 a[K][M], b[K][M], d[M][M];
  auto element = [&](u32 base, int lane, int e) { return i32(i8(w.v[base + e / 4][lane] >> (e & 3) * 8)); };
  for (int e = 0; e < per_lane; e++)
    for (int g = 0; g < groups; g++)
      for (int l = 0; l < M; l++) {
        a[g * per_lane + e][l] = element(i.src[0].index, g * M + l, e);
        b[g * per_lane + e][l] = element(i.src[1].index, g * M + l, e);
      }
  const Operand& c = i.src[2];
  for (int r = 0; r < registers; r++)
    for (int l = 0; l < kLanes; l++) {
      int row = M == 32 ? result_row(r, l / M) : 4 * (l / M) + r;
      d[row][l % M] = i32(c.kind == kVector ? w.v[c.index + r][l] : read_scalar(w, c));
    }
  for (int m = 0; m < M; m++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < M; n++) d[m][n] += a[k][m] * b[k][n];
  for (int r = 0; r < registers; r++)
    for (int l = 0; l < kLanes; l++)
      w.v[i.dst.index + r][l] = u32(d[M == 32 ? result_row(r, l / M) : 4 * (l / M) + r][l % M]);
}

// gfx950: the formats of A and B are fields of the instruction (cbsz, blgp): 0 fp8, 1 bf8; 2 to 4 are fp6, bf6, fp4.
template <int M, int K>
void mfma_f8f6f4(Wave& w, const Instruction& i) {
  if (i.cbsz > 1 || i.blgp > 1) return w.error(kUnsupported, i, 0, 0);
  if (i.cbsz == 0 && i.blgp == 0) mfma<M, K, kFp8, kFp8>(w, i);
  else if (i.cbsz == 0) mfma<M, K, kFp8, kBf8>(w, i);
  else if (i.blgp == 0) mfma<M, K, kBf8, kFp8>(w, i);
  else mfma<M, K, kBf8, kBf8>(w, i);
}

// 16 blocks of 4 x 4: block l / 4; the lane holds row or column l % 4 and 4 k; register r is row r.
void mfma_4x4x4_f16(Wave& w, const Instruction& i) {
  f32 a[4][kLanes], b[4][kLanes];
  u32 out[4][kLanes];
  for (int k = 0; k < 4; k++) {
    load_element<kF16>(w, i.src[0].index, k, a[k]);
    load_element<kF16>(w, i.src[1].index, k, b[k]);
  }
  const Operand& c = i.src[2];
  for (int r = 0; r < 4; r++)
    for (int l = 0; l < kLanes; l++) {
      f32 sum = c.kind == kVector ? bits<f32>(w.v[c.index + r][l]) : uniform_accumulator(w, c);
      for (int k = 0; k < 4; k++) sum = std::fma(a[k][(l & ~3) + r], b[k][l], sum);
      out[r][l] = bits<u32>(sum);
    }
  for (int r = 0; r < 4; r++) std::memcpy(w.v[i.dst.index + r], out[r], sizeof(out[r]));
}

// WMMA 16 x 16 x 16. gfx11: lanes 0 to 15 hold A's row (B's column) l with all 16 k, lanes 16 to 31 repeat them, and
// register r of the result holds row 2 r + l / 16. gfx12: a lane holds 8 k, from 8 (l / 16) on; rows r + 8 (l / 16).
template <Type T>
void wmma(Wave& w, const Instruction& i) {
  f32 a[16][16], b[16][16], lanes[kLanes];
  bool gfx12 = w.gfx >= 0x1200;
  for (int e = 0; e < (gfx12 ? 8 : 16); e++) {
    for (int source = 0; source < 2; source++) {
      load_element<T>(w, i.src[source].index, e, lanes);
      auto& to = source ? b : a;
      std::memcpy(to[e], lanes, sizeof(to[0]));
      if (gfx12) std::memcpy(to[8 + e], lanes + 16, sizeof(to[0]));
    }
  }
  const Operand& c = i.src[2];
  u32 out[8][32];
  for (int r = 0; r < 8; r++)
    for (int l = 0; l < 32; l++) {
      int m = gfx12 ? r + 8 * (l / 16) : 2 * r + l / 16, n = l % 16;
      f32 sum = c.kind == kVector ? bits<f32>(w.v[c.index + r][l]) : uniform_accumulator(w, c);
      for (int k = 0; k < 16; k++) sum = std::fma(a[k][m], b[k][n], sum);
      out[r][l] = bits<u32>(sum);
    }
  for (int r = 0; r < 8; r++) std::memcpy(w.v[i.dst.index + r], out[r], sizeof(out[r]));
}

}  // namespace

void add_matrix(Opcodes& ops) {
  // gfx90a's names lack the underscore before the type; "_1k" are its full-rate bf16 forms.
  ops.add({"v_mfma_f32_32x32x8_f16", "v_mfma_f32_32x32x8f16"}, mfma<32, 8, kF16, kF16>);
  ops.add({"v_mfma_f32_16x16x16_f16", "v_mfma_f32_16x16x16f16"}, mfma<16, 16, kF16, kF16>);
  ops.add({"v_mfma_f32_32x32x8_bf16", "v_mfma_f32_32x32x8bf16_1k", "v_mfma_f32_32x32x8_bf16_1k"},
          mfma<32, 8, kBf16, kBf16>);
  ops.add({"v_mfma_f32_16x16x16_bf16", "v_mfma_f32_16x16x16bf16_1k", "v_mfma_f32_16x16x16_bf16_1k"},
          mfma<16, 16, kBf16, kBf16>);
  ops.add("v_mfma_f32_32x32x4bf16", mfma<32, 4, kBf16, kBf16>);
  ops.add("v_mfma_f32_16x16x8bf16", mfma<16, 8, kBf16, kBf16>);
  ops.add("v_mfma_f32_32x32x16_f16", mfma<32, 16, kF16, kF16>);
  ops.add("v_mfma_f32_16x16x32_f16", mfma<16, 32, kF16, kF16>);
  ops.add("v_mfma_f32_32x32x16_bf16", mfma<32, 16, kBf16, kBf16>);
  ops.add("v_mfma_f32_16x16x32_bf16", mfma<16, 32, kBf16, kBf16>);
  ops.add({"v_mfma_f32_32x32x2_f32", "v_mfma_f32_32x32x2f32"}, mfma<32, 2, kF32, kF32>);
  ops.add({"v_mfma_f32_16x16x4_f32", "v_mfma_f32_16x16x4f32"}, mfma<16, 4, kF32, kF32>);
  ops.add("v_mfma_f32_32x32x4_xf32", mfma<32, 4, kXf32, kXf32>);
  ops.add("v_mfma_f32_16x16x8_xf32", mfma<16, 8, kXf32, kXf32>);
  ops.add("v_mfma_f32_32x32x16_fp8_fp8", mfma<32, 16, kFp8, kFp8>);
  ops.add("v_mfma_f32_16x16x32_fp8_fp8", mfma<16, 32, kFp8, kFp8>);
  ops.add("v_mfma_f32_32x32x16_bf8_bf8", mfma<32, 16, kBf8, kBf8>);
  ops.add("v_mfma_f32_16x16x32_bf8_bf8", mfma<16, 32, kBf8, kBf8>);
  ops.add("v_mfma_f32_32x32x16_fp8_bf8", mfma<32, 16, kFp8, kBf8>);
  ops.add("v_mfma_f32_16x16x32_fp8_bf8", mfma<16, 32, kFp8, kBf8>);
  ops.add("v_mfma_f32_32x32x16_bf8_fp8", mfma<32, 16, kBf8, kFp8>);
  ops.add("v_mfma_f32_16x16x32_bf8_fp8", mfma<16, 32, kBf8, kFp8>);
  ops.add("v_mfma_f32_16x16x128_f8f6f4", mfma_f8f6f4<16, 128>);
  ops.add("v_mfma_f32_32x32x64_f8f6f4", mfma_f8f6f4<32, 64>);
  ops.add({"v_mfma_f32_4x4x4_16b_f16", "v_mfma_f32_4x4x4f16"}, mfma_4x4x4_f16);
  ops.add("v_mfma_i32_16x16x32_i8", mfma_i8<16, 32>);
  ops.add("v_mfma_i32_32x32x16_i8", mfma_i8<32, 16>);
  ops.add("v_mfma_i32_16x16x64_i8", mfma_i8<16, 64>);
  ops.add("v_mfma_i32_32x32x32_i8", mfma_i8<32, 32>);
  ops.add("v_mfma_i32_16x16x16i8", mfma_i8<16, 16>);
  ops.add("v_mfma_i32_32x32x8i8", mfma_i8<32, 8>);
  ops.add("v_wmma_f32_16x16x16_f16", wmma<kF16>);
  ops.add("v_wmma_f32_16x16x16_bf16", wmma<kBf16>);
}
