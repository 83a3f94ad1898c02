// Atomic operations on global and buffer memory. One wave runs at a time, so they are plain read-modify-write.
// AMD CDNA3 ISA 12.15 and 12.16. Operands: global as stores (address, data, scalar base); buffer as loads.
#include "access.h"

u8* buffer_pointer(Wave& w, const Instruction& i, u32 size, int lane, bool writes);

namespace {

u64 address_of(Wave& w, const Instruction& i, int lane) {
  const Operand &address = i.src[0], &base = i.src[2];
  u64 a = base.kind == kScalar ? (u64(w.s[base.index + 1]) << 32 | w.s[base.index]) + w.v[address.index][lane]
                               : u64(w.v[address.index + 1][lane]) << 32 | w.v[address.index][lane];
  return a + i64(i.offset0);
}

template <class T>
T read_register(Wave& w, u32 base, int lane) {
  u32 words[sizeof(T) / 4];
  for (u32 k = 0; k < sizeof(T) / 4; k++) words[k] = w.v[base + k][lane];
  T value;
  std::memcpy(&value, words, sizeof(T));
  return value;
}

template <class T>
void write_back(Wave& w, u32 base, int lane, T value) {
  u32 words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  for (u32 k = 0; k < sizeof(T) / 4; k++) w.v[base + k][lane] = words[k];
}

template <class T, class F>
Handler global_atomic(F) {
  return [](Wave& w, const Instruction& i) {
    u64 exec = w.exec();
    for (int l = 0; l < kLanes; l++) {
      if (!bit(exec, l)) continue;
      u8* at = flat_pointer(w, i, address_of(w, i, l), sizeof(T), true, l, nullptr);
      if (!at) continue;
      T old;
      std::memcpy(&old, at, sizeof(T));
      T value = F{}(old, read_register<T>(w, i.src[1].index, l));
      std::memcpy(at, &value, sizeof(T));
      if (i.dst.kind == kVector) write_back(w, i.dst.index, l, old);
    }
  };
}

// Compare and swap: the data is the new value, then the expected one.
void global_compare_swap(Wave& w, const Instruction& i) {
  u64 exec = w.exec();
  for (int l = 0; l < kLanes; l++) {
    if (!bit(exec, l)) continue;
    u8* at = flat_pointer(w, i, address_of(w, i, l), 4, true, l, nullptr);
    if (!at) continue;
    u32 old, value = w.v[i.src[1].index][l], expected = w.v[i.src[1].index + 1][l];
    std::memcpy(&old, at, 4);
    if (old == expected) std::memcpy(at, &value, 4);
    if (i.dst.kind == kVector) w.v[i.dst.index][l] = old;
  }
}

template <class T, class F>
Handler buffer_atomic(F) {
  return [](Wave& w, const Instruction& i) {
    u64 exec = w.exec();
    for (int l = 0; l < kLanes; l++) {
      if (!bit(exec, l)) continue;
      u8* at = buffer_pointer(w, i, sizeof(T), l, true);
      T old{};
      if (at) {
        std::memcpy(&old, at, sizeof(T));
        T value = F{}(old, read_register<T>(w, i.dst.index, l));
        std::memcpy(at, &value, sizeof(T));
      }
      if (i.returns) write_back(w, i.dst.index, l, old);
    }
  };
}

template <class T, class F>
void add(Opcodes& ops, std::initializer_list<const char*> names, F f) {
  for (const char* name : names) {
    ops.add((std::string("global_atomic_") + name).c_str(), global_atomic<T>(f));
    ops.add((std::string("flat_atomic_") + name).c_str(), global_atomic<T>(f));
    ops.add((std::string("buffer_atomic_") + name).c_str(), buffer_atomic<T>(f));
  }
}

}  // namespace

void add_atomics(Opcodes& ops) {
  add<u32>(ops, {"add", "add_u32"}, [](u32 old, u32 x) { return old + x; });
  add<u32>(ops, {"sub", "sub_u32"}, [](u32 old, u32 x) { return old - x; });
  add<u64>(ops, {"add_x2", "add_u64"}, [](u64 old, u64 x) { return old + x; });
  add<f32>(ops, {"add_f32"}, [](f32 old, f32 x) { return old + x; });
  add<f64>(ops, {"add_f64"}, [](f64 old, f64 x) { return old + x; });
  add<i32>(ops, {"smax", "max_i32"}, [](i32 old, i32 x) { return larger(old, x); });
  add<u32>(ops, {"umax", "max_u32"}, [](u32 old, u32 x) { return larger(old, x); });
  add<u32>(ops, {"umin", "min_u32"}, [](u32 old, u32 x) { return smaller(old, x); });
  add<u32>(ops, {"or", "or_b32"}, [](u32 old, u32 x) { return old | x; });
  add<u32>(ops, {"and", "and_b32"}, [](u32 old, u32 x) { return old & x; });
  add<u32>(ops, {"swap", "swap_b32"}, [](u32, u32 x) { return x; });
  add<u32>(ops, {"inc", "inc_u32"}, [](u32 old, u32 x) { return old >= x ? 0 : old + 1; });
  add<u32>(ops, {"pk_add_f16"}, [](u32 old, u32 x) {
    return pack(float_to_half(half_to_float(u16(old)) + half_to_float(u16(x))),
                float_to_half(half_to_float(u16(old >> 16)) + half_to_float(u16(x >> 16))));
  });
  add<u32>(ops, {"pk_add_bf16"}, [](u32 old, u32 x) {
    return pack(float_to_bfloat(bfloat_to_float(old & 0xffff) + bfloat_to_float(x & 0xffff)),
                float_to_bfloat(bfloat_to_float(old >> 16) + bfloat_to_float(x >> 16)));
  });
  for (const char* name :
       {"global_atomic_cmpswap", "global_atomic_cmpswap_b32", "flat_atomic_cmpswap", "flat_atomic_cmpswap_b32"})
    ops.add(name, global_compare_swap);
}
