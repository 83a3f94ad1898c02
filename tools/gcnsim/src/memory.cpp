// Global, flat, scratch and buffer accesses, and scalar loads. AMD CDNA3 ISA chapters 8 to 10 and 12.13 to 12.16.
//
// Every access must lie within one registered region. Operands, as the front end orders them:
//   global, flat, scratch load: address, scalar base;  store: address, data, scalar base;  buffer: address, descriptor,
//   scalar offset, with the data as destination for stores too.
#include <utility>

#include "access.h"

namespace {

// gfx90a's descriptor of scratch memory is made up by the dispatcher with this last word.
constexpr u32 kScratchDescriptor = 0x5c5c5c5c;

u64 global_address(Wave& w, const Instruction& i, const Operand& address, const Operand& base, int lane) {
  u64 a;
  if (base.kind == kScalar)
    a = (u64(w.s[base.index + 1]) << 32 | w.s[base.index]) + (address.kind == kVector ? w.v[address.index][lane] : 0);
  else a = u64(w.v[address.index + 1][lane]) << 32 | w.v[address.index][lane];
  return a + i64(i.offset0);
}

// Straight to LDS: M0 + offset + lane * size.
template <class Pointer>
void load_to_lds(Wave& w, const Instruction& i, Width width, Pointer pointer) {
  u64 exec = w.exec();
  u32 base = (w.s[kM0] & 0x3ffff) + i.offset0;
  for (int l = 0; l < kLanes; l++) {
    if (!bit(exec, l)) continue;
    u32 value[4] = {};
    if (const u8* from = pointer(l)) std::memcpy(value, from, width.total());
    if (u8* to = lds_pointer(w, i, base + l * width.total(), width.total(), true, l, value))
      std::memcpy(to, value, width.total());
  }
}

template <class Pointer>
void load(Wave& w, const Instruction& i, Width width, Pointer pointer) {
  if (i.lds) load_to_lds(w, i, width, pointer);
  else load_lanes(w, width, i.dst.index, pointer);
}

template <int Index>
struct GlobalLoad {
  static void run(Wave& w, const Instruction& i) {
    Width width = kLoads[Index].width;
    load(w, i, width, [&](int l) {
      return flat_pointer(w, i, global_address(w, i, i.src[0], i.src[1], l), width.total(), false, l, nullptr);
    });
  }
};
template <int Index>
struct GlobalStore {
  static void run(Wave& w, const Instruction& i) {
    Width width = kStores[Index].width;
    store_lanes(w, width, i.src[1].index, [&](int l, const u32* value) {
      return flat_pointer(w, i, global_address(w, i, i.src[0], i.src[2], l), width.total(), true, l, value);
    });
  }
};

i64 scratch_offset(Wave& w, const Instruction& i, const Operand& address, const Operand& base, int lane) {
  return i64(i.offset0) + (address.kind == kVector ? w.v[address.index][lane] : 0) +
         (base.kind == kScalar ? w.s[base.index] : 0);
}

template <int Index>
struct ScratchLoad {
  static void run(Wave& w, const Instruction& i) {
    Width width = kLoads[Index].width;
    load(w, i, width,
         [&](int l) { return scratch_pointer(w, i, scratch_offset(w, i, i.src[0], i.src[1], l), width.total(), l); });
  }
};
template <int Index>
struct ScratchStore {
  static void run(Wave& w, const Instruction& i) {
    Width width = kStores[Index].width;
    store_lanes(w, width, i.src[1].index, [&](int l, const u32*) {
      return scratch_pointer(w, i, scratch_offset(w, i, i.src[0], i.src[2], l), width.total(), l);
    });
  }
};

template <int Index>
struct BufferLoad {
  static void run(Wave& w, const Instruction& i);
};
template <int Index>
struct BufferStore {
  static void run(Wave& w, const Instruction& i);
};

}  // namespace

u8* memory_pointer(Wave& w, const Instruction& i, u64 address, u32 size, bool writes, u32 lane) {
  Launch& launch = w.group->launch;
  for (u32 k = 0; k < launch.num_regions; k++) {
    Region& region = launch.regions[k];
    if (address < region.low || address + size > region.high || (writes && !region.writable)) continue;
    if (k) std::swap(region, launch.regions[k - 1]);  // what is used is found sooner next time
    return reinterpret_cast<u8*>(address);
  }
  w.error(writes ? kWriteOutside : kReadOutside, i, address, lane);
  return nullptr;
}

u8* scratch_pointer(Wave& w, const Instruction& i, i64 offset, u32 size, u32 lane) {
  i64 bytes = w.group->launch.scratch_bytes;
  if (offset < 0 || offset + i64(size) > bytes) {
    w.error(kScratchOutside, i, u64(offset), lane);
    return nullptr;
  }
  return &w.scratch[lane * bytes + offset];
}

// An address in an aperture is LDS or scratch memory.
u8* flat_pointer(Wave& w, const Instruction& i, u64 address, u32 size, bool writes, u32 lane, const void* value) {
  if (address >> 32 == w.s[kSharedBase + 1]) return lds_pointer(w, i, u32(address), size, writes, lane, value);
  if (address >> 32 == w.s[kPrivateBase + 1]) return scratch_pointer(w, i, u32(address), size, lane);
  return memory_pointer(w, i, address, size, writes, lane);
}

// Buffer addressing (raw and structured); what lies beyond the descriptor's size is dropped, as on hardware.
u8* buffer_pointer(Wave& w, const Instruction& i, u32 size, int lane, bool writes) {
  const u32* descriptor = &w.s[i.src[1].index];
  u32 soffset = read_scalar(w, i.src[2]), vector = i.src[0].index;
  if (descriptor[3] == kScratchDescriptor)
    return scratch_pointer(w, i, u64(i.offset0) + soffset + (i.offen ? w.v[vector][lane] : 0) + descriptor[0], size,
                           lane);
  u64 base = u64(descriptor[1] & 0xffff) << 32 | descriptor[0], offset = u32(i.offset0), row = 0;
  u32 records = descriptor[2], stride = descriptor[1] >> 16 & 0x3fff;
  if (i.idxen) row = w.v[vector++][lane];
  if (i.offen) offset += w.v[vector][lane];
  bool outside;
  if (i.idxen && stride) {
    outside = row >= records;
    offset += row * stride;
  } else {
    outside = offset + soffset + size > records;
  }
  if (outside) {
    w.group->launch.dropped++;
    return nullptr;
  }
  return memory_pointer(w, i, base + offset + soffset, size, writes, lane);
}

namespace {

template <int Index>
void BufferLoad<Index>::run(Wave& w, const Instruction& i) {
  Width width = kLoads[Index].width;
  load(w, i, width, [&](int l) { return buffer_pointer(w, i, width.total(), l, false); });
}
template <int Index>
void BufferStore<Index>::run(Wave& w, const Instruction& i) {
  Width width = kStores[Index].width;
  store_lanes(w, width, i.dst.index, [&](int l, const u32*) { return buffer_pointer(w, i, width.total(), l, true); });
}

// ---- scalar memory

u64 scalar_address(Wave& w, const Instruction& i) {
  u64 offset = i.src[1].kind == kScalar ? w.s[i.src[1].index] : u64(i64(i32(i.src[1].integer)));
  return read_pair(w, i.src[0]) + i64(i.offset0) + offset;
}

template <int Dwords>
void scalar_load(Wave& w, const Instruction& i) {
  u64 address = scalar_address(w, i) & ~3ull;
  u32 value[Dwords] = {};
  if (const u8* from = memory_pointer(w, i, address, Dwords * 4, false, 0)) std::memcpy(value, from, sizeof(value));
  std::memcpy(&w.s[i.dst.index], value, sizeof(value));
}

template <class T>
void scalar_load_small(Wave& w, const Instruction& i) {
  T value = 0;
  if (const u8* from = memory_pointer(w, i, scalar_address(w, i), sizeof(T), false, 0))
    std::memcpy(&value, from, sizeof(T));
  write_scalar(w, i.dst, u32(i32(value)));
}

template <int Dwords>
void scalar_buffer_load(Wave& w, const Instruction& i) {
  const u32* descriptor = &w.s[i.src[0].index];
  u64 base = u64(descriptor[1] & 0xffff) << 32 | descriptor[0];
  u32 offset = i.offset0 + read_scalar(w, i.src[1]), value[Dwords] = {};
  for (int k = 0; k < Dwords; k++) {
    if (offset + 4 * k + 4 > descriptor[2]) continue;
    if (const u8* from = memory_pointer(w, i, base + offset + 4 * k, 4, false, 0)) std::memcpy(&value[k], from, 4);
  }
  std::memcpy(&w.s[i.dst.index], value, sizeof(value));
}

}  // namespace

void add_memory(Opcodes& ops) {
  for (const char* prefix : {"global_", "flat_"}) {
    add_widths<kLoads, GlobalLoad>(ops, prefix);
    add_widths<kStores, GlobalStore>(ops, prefix);
  }
  add_widths<kLoads, ScratchLoad>(ops, "scratch_");
  add_widths<kStores, ScratchStore>(ops, "scratch_");
  add_widths<kLoads, BufferLoad>(ops, "buffer_");
  add_widths<kStores, BufferStore>(ops, "buffer_");
  ops.add({"s_load_dword", "s_load_b32"}, scalar_load<1>);
  ops.add({"s_load_dwordx2", "s_load_b64"}, scalar_load<2>);
  ops.add("s_load_b96", scalar_load<3>);
  ops.add({"s_load_dwordx4", "s_load_b128"}, scalar_load<4>);
  ops.add({"s_load_dwordx8", "s_load_b256"}, scalar_load<8>);
  ops.add({"s_load_dwordx16", "s_load_b512"}, scalar_load<16>);
  ops.add("s_load_u8", scalar_load_small<u8>);
  ops.add("s_load_i8", scalar_load_small<i8>);
  ops.add("s_load_u16", scalar_load_small<u16>);
  ops.add("s_load_i16", scalar_load_small<i16>);
  ops.add({"s_buffer_load_dword", "s_buffer_load_b32"}, scalar_buffer_load<1>);
  ops.add({"s_buffer_load_dwordx2", "s_buffer_load_b64"}, scalar_buffer_load<2>);
  ops.add({"s_buffer_load_dwordx4", "s_buffer_load_b128"}, scalar_buffer_load<4>);
  ops.add({"s_buffer_load_dwordx8", "s_buffer_load_b256"}, scalar_buffer_load<8>);
}
