// What LDS and memory instructions share: the width of an access, checked pointers, and moving data to and from lanes.
#pragma once

#include "operands.h"

enum Extend { kPlain, kSigned, kLowHalf, kHighHalf };  // sub-dword loads: zero or sign extended, or into one half (d16)

struct Width {
  int dwords = 1;
  int bytes = 0;  // 1 or 2 for less than a dword, else 0
  Extend extend = kPlain;
  int total() const { return bytes ? bytes : dwords * 4; }
};

// Pointers are null, and an error is recorded, where the access is not allowed; such loads give 0.
u8* lds_pointer(Wave& w, const Instruction& i, u32 address, u32 size, bool writes, u32 lane, const void* value);
u8* memory_pointer(Wave& w, const Instruction& i, u64 address, u32 size, bool writes, u32 lane);
u8* scratch_pointer(Wave& w, const Instruction& i, i64 offset, u32 size, u32 lane);
u8* flat_pointer(Wave& w, const Instruction& i, u64 address, u32 size, bool writes, u32 lane, const void* value);

// Load each active lane from pointer(lane) into registers from `base` on.
template <class Pointer>
void load_lanes(Wave& w, Width width, u32 base, Pointer pointer) {
  u64 exec = w.exec();
  u32 out[4][kLanes];
  for (int l = 0; l < kLanes; l++) {
    if (!bit(exec, l)) continue;
    const u8* from = pointer(l);
    if (!width.bytes) {
      u32 value[4] = {};
      if (from) std::memcpy(value, from, width.dwords * 4);
      for (int k = 0; k < width.dwords; k++) out[k][l] = value[k];
      continue;
    }
    u32 x = 0, old = w.v[base][l];
    if (from) std::memcpy(&x, from, width.bytes);
    switch (width.extend) {
      case kPlain:
        break;
      case kSigned:
        x = width.bytes == 1 ? u32(i32(i8(x))) : u32(i32(i16(x)));
        break;
      case kLowHalf:
        x = (old & 0xffff0000) | (x & 0xffff);
        break;
      case kHighHalf:
        x = (old & 0xffff) | x << 16;
        break;
    }
    out[0][l] = x;
  }
  for (int k = 0; k < width.dwords; k++) write_register(w, base + k, out[k], exec);
}

// Store each active lane's registers from `base` on to pointer(lane, value).
template <class Pointer>
void store_lanes(Wave& w, Width width, u32 base, Pointer pointer) {
  u64 exec = w.exec();
  for (int l = 0; l < kLanes; l++) {
    if (!bit(exec, l)) continue;
    u32 value[4];
    for (int k = 0; k < width.dwords; k++) value[k] = w.v[base + k][l];
    if (width.extend == kHighHalf) value[0] >>= 16;
    if (u8* to = pointer(l, value)) std::memcpy(to, value, width.total());
  }
}

// Names and widths of loads and stores; each memory kind has them under two spellings (gfx9; gfx11 and later).
struct NamedWidth {
  const char *name, *new_name;
  Width width;
};
constexpr NamedWidth kLoads[] = {
    {"load_dword", "load_b32", {1}},
    {"load_dwordx2", "load_b64", {2}},
    {"load_dwordx3", "load_b96", {3}},
    {"load_dwordx4", "load_b128", {4}},
    {"load_ushort", "load_u16", {1, 2}},
    {"load_sshort", "load_i16", {1, 2, kSigned}},
    {"load_ubyte", "load_u8", {1, 1}},
    {"load_sbyte", "load_i8", {1, 1, kSigned}},
    {"load_short_d16", "load_d16_b16", {1, 2, kLowHalf}},
    {"load_short_d16_hi", "load_d16_hi_b16", {1, 2, kHighHalf}},
    {"load_ubyte_d16", "load_d16_u8", {1, 1, kLowHalf}},
    {"load_ubyte_d16_hi", "load_d16_hi_u8", {1, 1, kHighHalf}},
};
constexpr NamedWidth kStores[] = {
    {"store_dword", "store_b32", {1}},
    {"store_dwordx2", "store_b64", {2}},
    {"store_dwordx3", "store_b96", {3}},
    {"store_dwordx4", "store_b128", {4}},
    {"store_short", "store_b16", {1, 2}},
    {"store_byte", "store_b8", {1, 1}},
    {"store_short_d16_hi", "store_d16_hi_b16", {1, 2, kHighHalf}},
    {"store_byte_d16_hi", "store_d16_hi_b8", {1, 1, kHighHalf}},
};

// The entry of a table that an instruction was registered with, as a compile-time index.
template <const auto& Table, template <int> class Maker, int Index = 0>
void add_widths(Opcodes& ops, const char* prefix) {
  if constexpr (Index < int(sizeof(Table) / sizeof(Table[0]))) {
    for (const char* name : {Table[Index].name, Table[Index].new_name})
      ops.add((std::string(prefix) + name).c_str(), Maker<Index>::run);
    add_widths<Table, Maker, Index + 1>(ops, prefix);
  }
}
