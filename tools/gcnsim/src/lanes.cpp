// Instructions that move data between lanes or register files. AMD CDNA3 ISA 12.7, RDNA3 ISA 16.9, CDNA4 ISA (swaps).
#include <utility>

#include "operands.h"

namespace {

void read_first_lane(Wave& w, const Instruction& i) {
  u64 exec = w.exec();
  int lane = exec ? __builtin_ctzll(exec) : 0;
  write_scalar(w, i.dst, i.src[0].kind == kVector ? w.v[i.src[0].index][lane] : read_scalar(w, i.src[0]));
}

void read_lane(Wave& w, const Instruction& i) {
  write_scalar(w, i.dst, w.v[i.src[0].index][read_scalar(w, i.src[1]) & (w.lanes - 1)]);
}

void write_lane(Wave& w, const Instruction& i) {
  w.v[i.dst.index][read_scalar(w, i.src[1]) & (w.lanes - 1)] = read_scalar(w, i.src[0]);
}

void move_accumulator(Wave& w, const Instruction& i) {
  u32 a[kLanes];
  read(w, i, 0, a);
  write_register(w, i.dst.index, a, w.exec());
}

void swap(Wave& w, const Instruction& i) {
  u64 exec = w.exec();
  for (int l = 0; l < kLanes; l++)
    if (bit(exec, l)) std::swap(w.v[i.dst.index][l], w.v[i.src[0].index][l]);
}

// gfx950: upper half of the first register with the lower half of the second, per wave or per 32 lanes.
template <int Half>
void permute_lane_swap(Wave& w, const Instruction& i) {
  for (int base = 0; base < kLanes; base += 2 * Half)
    for (int l = 0; l < Half; l++) std::swap(w.v[i.dst.index][base + Half + l], w.v[i.src[0].index][base + l]);
}

// RDNA: any lane of the same row of 16 (or, crossed, of the neighbouring row); 16 selectors of 4 bits in two scalars.
template <bool Cross>
void permute_lane16(Wave& w, const Instruction& i) {
  u32 old[kLanes], r[kLanes] = {};
  std::memcpy(old, w.v[i.dst.index], sizeof(old));
  u32 low = read_scalar(w, i.src[1]), high = read_scalar(w, i.src[2]);
  u64 exec = w.exec();
  const u32* from = w.v[i.src[0].index];
  bool fetch_inactive = i.op_sel & 1, bound_control = i.op_sel & 2;
  for (int l = 0; l < int(w.lanes); l++) {
    int k = l & 15, selector = (k < 8 ? low >> 4 * k : high >> 4 * (k - 8)) & 15;
    int source = ((l & ~15) ^ (Cross ? 16 : 0)) + selector;
    r[l] = fetch_inactive || bit(exec, source) ? from[source] : bound_control ? 0 : old[l];
  }
  write_register(w, i.dst.index, r, exec);
}

void permute_lane64(Wave& w, const Instruction& i) {
  u32 t[kLanes];
  std::memcpy(t, w.v[i.src[0].index], sizeof(t));
  for (int l = 0; l < kLanes; l++) w.v[i.dst.index][l] = t[l ^ 32];
}

// Number of mask bits below this lane, in the lower or upper 32 lanes.
template <bool Upper>
void masked_bit_count(Wave& w, const Instruction& i) {
  u32 a[kLanes], b[kLanes], r[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  for (int l = 0; l < kLanes; l++) {
    u32 below = Upper ? (l >= 32 ? (1u << (l - 32)) - 1 : 0) : (l >= 32 ? ~0u : (1u << l) - 1);
    r[l] = u32(__builtin_popcount(a[l] & below)) + b[l];
  }
  write(w, i, r);
}

}  // namespace

void add_lanes(Opcodes& ops) {
  ops.add("v_readfirstlane_b32", read_first_lane);
  ops.add("v_readlane_b32", read_lane);
  ops.add("v_writelane_b32", write_lane);
  ops.add({"v_accvgpr_read_b32", "v_accvgpr_read", "v_accvgpr_write_b32", "v_accvgpr_write", "v_accvgpr_mov_b32"},
          move_accumulator);
  ops.add("v_swap_b32", swap);
  ops.add("v_permlane32_swap_b32", permute_lane_swap<32>);
  ops.add("v_permlane16_swap_b32", permute_lane_swap<16>);
  ops.add("v_permlane16_b32", permute_lane16<false>);
  ops.add("v_permlanex16_b32", permute_lane16<true>);
  ops.add("v_permlane64_b32", permute_lane64);
  ops.add("v_mbcnt_lo_u32_b32", masked_bit_count<false>);
  ops.add("v_mbcnt_hi_u32_b32", masked_bit_count<true>);
}
