// LDS (shared memory): loads, stores, atomics, permutes, transposed loads; race detection and bank conflicts.
// AMD CDNA3 ISA 12.14 and chapter 11, RDNA3 ISA 16.16; CDNA4 ISA for ds_read_b64_tr.
#include "access.h"

namespace {

// A race is a pair of accesses to one dword by different waves with no barrier between them, at least one a write;
// two writes of the same value are let pass.
void note_access(Wave& w, const Instruction& i, u32 address, u32 size, bool writes, u32 lane, const void* value) {
  Workgroup& group = *w.group;
  if (!group.launch.check_races) return;
  auto epoch = [](u32 tag) { return (tag - 1) / 64; };
  auto wave = [](u32 tag) { return (tag - 1) % 64; };
  auto foreign = [&](u32 tag) { return tag && epoch(tag) == w.epoch && wave(tag) != w.id; };
  u32 mine = w.epoch * 64 + w.id + 1;
  for (u32 dword = address / 4; dword <= (address + size - 1) / 4; dword++) {
    LdsShadow& shadow = group.shadow[dword];
    bool whole = size >= 4;
    u32 written = 0;
    if (writes && whole) std::memcpy(&written, static_cast<const u8*>(value) + (dword * 4 - address), 4);
    if (foreign(shadow.writer)) {
      if (!writes) w.error(kLdsRace, i, address, lane, kReadAfterWrite);
      else if (whole && shadow.value != written) w.error(kLdsRace, i, address, lane, kWriteAfterWrite);
    }
    if (writes && foreign(shadow.reader)) w.error(kLdsRace, i, address, lane, kWriteAfterRead);
    if (writes) {
      shadow.writer = mine;
      if (whole) shadow.value = written;
    } else if (!foreign(shadow.reader)) {
      shadow.reader = mine;
    }
  }
}

// Conflicts: 32 banks of 4 bytes, 128 bytes a clock. Lanes are served in groups; for 16-byte reads in the order
// measured on CDNA3. Not valid for gfx950, whose LDS has 64 banks for some accesses.
void count_bank_cycles(Wave& w, const Instruction& i, u32 offset, int size, bool writes) {
  Launch& launch = w.group->launch;
  if (!launch.count_banks) return;
  static const u8 wide_reads[4][8] = {{0, 1, 2, 3, 20, 21, 22, 23},
                                      {4, 5, 6, 7, 16, 17, 18, 19},
                                      {8, 9, 10, 11, 28, 29, 30, 31},
                                      {12, 13, 14, 15, 24, 25, 26, 27}};
  u64 exec = w.exec(), cycles = 0, ideal = 0;
  int group_size = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (int group = 0; group < int(w.lanes) / group_size; group++) {
    u32 dwords[32][32];
    u8 count[32] = {};
    bool any = false;
    for (int k = 0; k < group_size; k++) {
      int lane = size == 16 && !writes ? group / 4 * 32 + wide_reads[group % 4][k] : group * group_size + k;
      if (!bit(exec, lane)) continue;
      any = true;
      u32 address = w.v[i.src[0].index][lane] + offset;
      for (u32 dword = address / 4; dword <= (address + size - 1) / 4; dword++) {
        int bank = dword & 31, seen = 0;
        while (seen < count[bank] && dwords[bank][seen] != dword) seen++;
        if (seen == count[bank] && seen < 32) dwords[bank][count[bank]++] = dword;
      }
    }
    if (!any) continue;
    int worst = 1;
    for (int bank = 0; bank < 32; bank++) worst = larger(worst, int(count[bank]));
    cycles += worst;
    ideal++;
  }
  launch.bank_cycles[i.number] += cycles;
  launch.bank_ideal[i.number] += ideal;
}

void load(Wave& w, const Instruction& i, const u32* addresses, u32 offset, u32 base, Width width) {
  count_bank_cycles(w, i, offset, width.total(), false);
  load_lanes(w, width, base,
             [&](int l) { return lds_pointer(w, i, addresses[l] + offset, width.total(), false, l, nullptr); });
}

void store(Wave& w, const Instruction& i, u32 offset, u32 base, Width width) {
  count_bank_cycles(w, i, offset, width.total(), true);
  const u32* addresses = w.v[i.src[0].index];
  store_lanes(w, width, base, [&](int l, const u32* value) {
    return lds_pointer(w, i, addresses[l] + offset, width.total(), true, l, value);
  });
}

constexpr NamedWidth kLdsLoads[] = {
    {"read_b32", "load_b32", {1}},
    {"read_b64", "load_b64", {2}},
    {"read_b96", "load_b96", {3}},
    {"read_b128", "load_b128", {4}},
    {"read_u16", "load_u16", {1, 2}},
    {"read_i16", "load_i16", {1, 2, kSigned}},
    {"read_u8", "load_u8", {1, 1}},
    {"read_i8", "load_i8", {1, 1, kSigned}},
    {"read_u16_d16", "load_u16_d16", {1, 2, kLowHalf}},
    {"read_u16_d16_hi", "load_u16_d16_hi", {1, 2, kHighHalf}},
    {"read_u8_d16", "load_u8_d16", {1, 1, kLowHalf}},
    {"read_u8_d16_hi", "load_u8_d16_hi", {1, 1, kHighHalf}},
};
constexpr NamedWidth kLdsStores[] = {
    {"write_b32", "store_b32", {1}},
    {"write_b64", "store_b64", {2}},
    {"write_b96", "store_b96", {3}},
    {"write_b128", "store_b128", {4}},
    {"write_b16", "store_b16", {1, 2}},
    {"write_b8", "store_b8", {1, 1}},
    {"write_b16_d16_hi", "store_b16_d16_hi", {1, 2, kHighHalf}},
    {"write_b8_d16_hi", "store_b8_d16_hi", {1, 1, kHighHalf}},
};

template <int Index>
struct LdsLoad {
  static void run(Wave& w, const Instruction& i) {
    load(w, i, w.v[i.src[0].index], i.offset0, i.dst.index, kLdsLoads[Index].width);
  }
};
template <int Index>
struct LdsStore {
  static void run(Wave& w, const Instruction& i) { store(w, i, i.offset0, i.src[1].index, kLdsStores[Index].width); }
};

// Two accesses in one instruction; the offsets count elements, or 64 elements.
template <int Dwords, int Stride>
void load_two(Wave& w, const Instruction& i) {
  u32 addresses[kLanes];  // the first half may overwrite the address register
  std::memcpy(addresses, w.v[i.src[0].index], sizeof(addresses));
  load(w, i, addresses, i.offset0 * Dwords * 4 * Stride, i.dst.index, {Dwords});
  load(w, i, addresses, i.offset1 * Dwords * 4 * Stride, i.dst.index + Dwords, {Dwords});
}

template <int Dwords, int Stride>
void store_two(Wave& w, const Instruction& i) {
  store(w, i, i.offset0 * Dwords * 4 * Stride, i.src[1].index, {Dwords});
  store(w, i, i.offset1 * Dwords * 4 * Stride, i.src[2].index, {Dwords});
}

// Pull from the lane that the address names; inactive source lanes give 0.
void permute_backward(Wave& w, const Instruction& i) {
  u64 exec = w.exec();
  u32 r[kLanes] = {};
  const u32 *addresses = w.v[i.src[0].index], *from = w.v[i.src[1].index];
  for (int l = 0; l < kLanes; l++) {
    u32 source = (addresses[l] + i.offset0) / 4 % w.lanes;
    if (bit(exec, l) && bit(exec, source)) r[l] = from[source];
  }
  write_register(w, i.dst.index, r, exec);
}

void permute_forward(Wave& w, const Instruction& i) {
  u64 exec = w.exec();
  u32 r[kLanes] = {};
  const u32 *addresses = w.v[i.src[0].index], *from = w.v[i.src[1].index];
  for (int l = 0; l < kLanes; l++)
    if (bit(exec, l)) r[(addresses[l] + i.offset0) / 4 % w.lanes] = from[l];
  write_register(w, i.dst.index, r, exec);
}

// The offset is a pattern: quad permutation (bit 15), else masks for the lane number within 32.
void swizzle(Wave& w, const Instruction& i) {
  u64 exec = w.exec();
  u32 r[kLanes] = {}, pattern = i.offset0;
  const u32* from = w.v[i.src[0].index];
  for (int l = 0; l < kLanes; l++) {
    int source;
    if (pattern >> 15) source = (l & ~3) + (pattern >> (l & 3) * 2 & 3);
    else source = (l & 32) | ((((l & 31) & (pattern & 31)) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31));
    r[l] = bit(exec, source) ? from[source] : 0;
  }
  write_register(w, i.dst.index, r, exec);
}

// Transposed loads (gfx950): within 16 lanes, 8 bytes a lane are read and handed out by column. With elements of T,
// n = 8 / sizeof(T): lane l, element e gets element l % n of lane (l & ~15) + (l % 16) / n + e * (16 / n).
template <class T>
void load_transposed(Wave& w, const Instruction& i) {
  constexpr int n = 8 / sizeof(T);
  count_bank_cycles(w, i, i.offset0, 8, false);
  u64 exec = w.exec();
  T in[kLanes][n] = {}, out[n];
  for (int l = 0; l < kLanes; l++) {
    if (!bit(exec, l)) continue;
    const u8* from = lds_pointer(w, i, w.v[i.src[0].index][l] + i.offset0, 8, false, l, nullptr);
    if (from) std::memcpy(in[l], from, 8);
  }
  u32 r[2][kLanes];
  for (int l = 0; l < kLanes; l++) {
    for (int e = 0; e < n; e++) out[e] = in[(l & ~15) + (l & 15) / n + e * (16 / n)][l % n];
    std::memcpy(&r[0][l], out, 4);
    std::memcpy(&r[1][l], reinterpret_cast<u8*>(out) + 4, 4);
  }
  write_register(w, i.dst.index, r[0], exec);
  write_register(w, i.dst.index + 1, r[1], exec);
}

template <class T, bool Returns, class F>
Handler atomic(F) {
  return [](Wave& w, const Instruction& i) {
    u64 exec = w.exec();
    for (int l = 0; l < kLanes; l++) {
      if (!bit(exec, l)) continue;
      u32 address = w.v[i.src[0].index][l] + i.offset0;
      if (u64(address) + sizeof(T) > w.group->lds.size()) {
        w.error(kLdsOutside, i, address, l);
        continue;
      }
      T old, x = bits<T>(w.v[i.src[1].index][l]);
      std::memcpy(&old, &w.group->lds[address], sizeof(T));
      T result = F{}(old, x);
      std::memcpy(&w.group->lds[address], &result, sizeof(T));
      if (Returns) w.v[i.dst.index][l] = bits<u32>(old);
    }
  };
}

template <class T, class F>
void add_atomic(Opcodes& ops, const std::string& operation, const std::string& type, F f) {
  ops.add(("ds_" + operation + "_" + type).c_str(), atomic<T, false>(f));
  ops.add(("ds_" + operation + "_rtn_" + type).c_str(), atomic<T, true>(f));
}

}  // namespace

u8* lds_pointer(Wave& w, const Instruction& i, u32 address, u32 size, bool writes, u32 lane, const void* value) {
  if (u64(address) + size > w.group->lds.size()) {
    w.error(kLdsOutside, i, address, lane);
    return nullptr;
  }
  note_access(w, i, address, size, writes, lane, value);
  return &w.group->lds[address];
}

void add_lds(Opcodes& ops) {
  add_widths<kLdsLoads, LdsLoad>(ops, "ds_");
  add_widths<kLdsStores, LdsStore>(ops, "ds_");
  ops.add({"ds_read2_b32", "ds_load_2addr_b32"}, load_two<1, 1>);
  ops.add({"ds_read2_b64", "ds_load_2addr_b64"}, load_two<2, 1>);
  ops.add({"ds_read2st64_b32", "ds_load_2addr_stride64_b32"}, load_two<1, 64>);
  ops.add({"ds_read2st64_b64", "ds_load_2addr_stride64_b64"}, load_two<2, 64>);
  ops.add({"ds_write2_b32", "ds_store_2addr_b32"}, store_two<1, 1>);
  ops.add({"ds_write2_b64", "ds_store_2addr_b64"}, store_two<2, 1>);
  ops.add({"ds_write2st64_b32", "ds_store_2addr_stride64_b32"}, store_two<1, 64>);
  ops.add({"ds_write2st64_b64", "ds_store_2addr_stride64_b64"}, store_two<2, 64>);
  ops.add("ds_bpermute_b32", permute_backward);
  ops.add("ds_permute_b32", permute_forward);
  ops.add("ds_swizzle_b32", swizzle);
  ops.add("ds_read_b64_tr_b16", load_transposed<u16>);
  ops.add("ds_read_b64_tr_b8", load_transposed<u8>);
  add_atomic<u32>(ops, "add", "u32", [](u32 old, u32 x) { return old + x; });
  add_atomic<f32>(ops, "add", "f32", [](f32 old, f32 x) { return old + x; });
  add_atomic<i32>(ops, "max", "i32", [](i32 old, i32 x) { return larger(old, x); });
  add_atomic<u32>(ops, "max", "u32", [](u32 old, u32 x) { return larger(old, x); });
  add_atomic<u32>(ops, "min", "u32", [](u32 old, u32 x) { return smaller(old, x); });
  add_atomic<u32>(ops, "or", "b32", [](u32 old, u32 x) { return old | x; });
  add_atomic<u32>(ops, "and", "b32", [](u32 old, u32 x) { return old & x; });
}
