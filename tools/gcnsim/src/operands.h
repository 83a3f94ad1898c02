// Reading and writing operands: scalars, masks, and the 64 lanes of a vector with DPP, SDWA, op_sel and modifiers.
//
// AMD CDNA3 ISA chapters 5 (scalar operands), 6 (vector operands), 6.6 (SDWA), 6.7 (DPP); RDNA3 ISA 7.
#pragma once

#include <cmath>
#include <type_traits>

#include "number.h"
#include "state.h"

// ---- scalars

inline u32 read_scalar(Wave& w, const Operand& o) {
  switch (o.kind) {
    case kScalar:
      return o.index == kSccOperand ? w.scc : w.s[o.index];
    case kVector:
      return w.v[o.index][0];
    case kReal:
      return bits<u32>(f32(o.real));
    default:
      return u32(o.integer);
  }
}

inline u64 read_pair(Wave& w, const Operand& o) {
  switch (o.kind) {
    case kScalar:
      return o.count == 1 ? w.s[o.index] : u64(w.s[o.index + 1]) << 32 | w.s[o.index];
    case kReal:
      return bits<u64>(o.real);
    case kLiteral:
      return u32(o.integer);  // a 32-bit literal of a B64 or U64 operand is zero extended
    default:
      return u64(o.integer);
  }
}

inline void write_scalar(Wave& w, const Operand& o, u32 value) {
  if (o.kind == kScalar) w.s[o.index] = value;
}

inline void write_pair(Wave& w, const Operand& o, u64 value) {
  if (o.kind != kScalar) return;
  w.s[o.index] = u32(value);
  w.s[o.index + 1] = u32(value >> 32);
}

// A lane mask: 64 or 32 bits, by the wave's size.
inline u64 read_mask(Wave& w, const Operand& o) {
  if (o.kind != kScalar) return u64(o.integer);
  return w.lanes == 64 ? u64(w.s[o.index + 1]) << 32 | w.s[o.index] : w.s[o.index];
}

inline void write_mask(Wave& w, const Operand& o, u64 value) {
  if (o.kind != kScalar) return;
  w.s[o.index] = u32(value);
  if (w.lanes == 64) w.s[o.index + 1] = u32(value >> 32);
}

// The mask a carry or select takes: src[2] where given, else VCC.
inline u64 read_condition(Wave& w, const Instruction& i) { return i.src[2].kind ? read_mask(w, i.src[2]) : w.vcc(); }

inline bool bit(u64 mask, int lane) { return mask >> lane & 1; }

// ---- DPP: which lane a lane reads from

// -1 where that is outside the row or wave.
inline int dpp_source(const Instruction& i, int lane, int lanes) {
  int row = lane & ~15, k = lane & 15, n = i.dpp_argument;
  switch (i.dpp) {
    case kQuadPerm:
      return (lane & ~3) + (n >> (lane & 3) * 2 & 3);
    case kRowShl:
      return k + n <= 15 ? lane + n : -1;
    case kRowShr:
      return k - n >= 0 ? lane - n : -1;
    case kRowRor:
      return row + (k - n & 15);
    case kRowMirror:
      return row + 15 - k;
    case kRowHalfMirror:
      return (lane & ~7) + 7 - (lane & 7);
    case kRowBcast:  // 15: the last lane of each row to the next row; 31: lane 31 to rows 2 and 3
      if (n == 15) return lane >> 4 & 1 ? row - 1 : -1;
      return lane >= 32 ? 31 : -1;
    case kRowShare:
      return row + n;
    case kRowXmask:
      return row + (k ^ n);
    case kWaveShl:
      return lane + 1 < lanes ? lane + 1 : -1;
    case kWaveRol:
      return (lane + 1) % lanes;
    case kWaveShr:
      return lane - 1;
    case kWaveRor:
      return (lane - 1 + lanes) % lanes;
    case kDpp8:
      return (lane & ~7) + (n >> (lane & 7) * 3 & 7);
  }
  return lane;
}

inline bool dpp_source_valid(Wave& w, const Instruction& i, int source, u64 exec) {
  return source >= 0 && source < int(w.lanes) && (i.fetch_inactive || bit(exec, source));
}

// Lanes that an instruction writes: EXEC, and with DPP the row and bank masks and lanes with a source.
inline u64 write_lanes(Wave& w, const Instruction& i) {
  u64 exec = w.exec();
  if (!i.dpp) return exec;
  u64 mask = 0;
  for (int lane = 0; lane < int(w.lanes); lane++) {
    if (!bit(i.row_mask, lane / 16) || !bit(i.bank_mask, (lane & 15) / 4)) continue;
    if (i.bound_ctrl || dpp_source_valid(w, i, dpp_source(i, lane, w.lanes), exec)) mask |= 1ull << lane;
  }
  return exec & mask;
}

// ---- vectors

inline u32 sdwa_select(u32 x, u8 select, bool sign_extend) {
  if (select == 6) return x;
  if (select >= 4) {
    u16 half = u16(x >> (select - 4) * 16);
    return sign_extend ? u32(i32(i16(half))) : half;
  }
  u8 byte = u8(x >> select * 8);
  return sign_extend ? u32(i32(i8(byte))) : byte;
}

template <class T>
constexpr bool is_float = std::is_floating_point_v<T> || std::is_same_v<T, Half>;

// The bits of a constant or scalar operand, as a type of sizeof(T) bytes sees them.
template <class T>
inline u32 uniform_bits(Wave& w, const Operand& o) {
  if (o.kind == kReal && sizeof(T) == 2) return float_to_half(f32(o.real));
  return read_scalar(w, o);
}

template <class T>
inline u64 uniform_bits64(Wave& w, const Operand& o) {
  if (o.kind == kLiteral) {
    if (is_float<T>) return u64(u32(o.integer)) << 32;  // a 32-bit literal is the upper half of a double
    return std::is_signed_v<T> ? u64(i64(i32(o.integer))) : u64(u32(o.integer));
  }
  return read_pair(w, o);
}

template <class T>
inline void read64(Wave& w, const Operand& o, T* out) {
  u64 t[kLanes];
  if (o.kind == kVector) {
    for (int l = 0; l < kLanes; l++) t[l] = u64(w.v[o.index + 1][l]) << 32 | w.v[o.index][l];
  } else {
    u64 x = uniform_bits64<T>(w, o);
    for (int l = 0; l < kLanes; l++) t[l] = x;
  }
  if (is_float<T> && o.absolute)
    for (int l = 0; l < kLanes; l++) t[l] &= ~(1ull << 63);
  if (is_float<T> && o.negate)
    for (int l = 0; l < kLanes; l++) t[l] ^= 1ull << 63;
  std::memcpy(out, t, sizeof(t));
}

// All lanes of source k, modifiers applied, also those that EXEC switches off.
template <class T>
inline void read(Wave& w, const Instruction& i, int k, T* out) {
  const Operand& o = i.src[k];
  if constexpr (sizeof(T) == 8) {
    read64(w, o, out);
  } else {
    u32 t[kLanes];
    bool constant = false;
    if (o.kind == kVector) {
      const u32* from = w.v[o.index];
      if (k == 0 && i.dpp) {
        u64 exec = w.exec();
        for (int l = 0; l < kLanes; l++) {
          int source = l < int(w.lanes) ? dpp_source(i, l, w.lanes) : -1;
          t[l] = dpp_source_valid(w, i, source, exec) ? from[source] : 0;
        }
      } else {
        std::memcpy(t, from, sizeof(t));
      }
    } else {
      constant = o.kind != kScalar;
      u32 x = uniform_bits<T>(w, o);
      for (int l = 0; l < kLanes; l++) t[l] = x;
    }
    if (i.sdwa && o.select != 6)
      for (int l = 0; l < kLanes; l++) t[l] = sdwa_select(t[l], o.select, o.sign_extend);
    if constexpr (sizeof(T) == 4) {
      if (is_float<T> && o.absolute)
        for (int l = 0; l < kLanes; l++) t[l] &= 0x7fffffff;
      if (is_float<T> && o.negate)
        for (int l = 0; l < kLanes; l++) t[l] ^= 0x80000000;
      std::memcpy(out, t, sizeof(t));
    } else {
      u32 shift = !i.sdwa && !constant && bit(i.op_sel, k) ? 16 : 0;
      u16 keep = is_float<T> && o.absolute ? 0x7fff : 0xffff, flip = is_float<T> && o.negate ? 0x8000 : 0;
      for (int l = 0; l < kLanes; l++) out[l] = bits<T>(u16((u16(t[l] >> shift) & keep) ^ flip));
    }
  }
}

inline void write_register(Wave& w, u32 index, const u32* x, u64 mask) {
  u32* to = w.v[index];
  if (mask == ~0ull || (w.lanes == 32 && mask == 0xffffffffull)) {
    std::memcpy(to, x, w.lanes * 4);
    return;
  }
  for (int l = 0; l < kLanes; l++) to[l] = bit(mask, l) ? x[l] : to[l];
}

inline u32 sdwa_insert(const Instruction& i, u32 value, u32 old) {
  bool half = i.sdwa_dst >= 4;
  u32 shift = half ? (i.sdwa_dst - 4) * 16 : i.sdwa_dst * 8, field = half ? 0xffff : 0xff;
  u32 placed = (value & field) << shift;
  if (i.sdwa_unused == 2) return placed | (old & ~(field << shift));
  if (i.sdwa_unused == 1) return (half ? u32(i32(i16(value))) : u32(i32(i8(value)))) << shift;
  return placed;
}

// Write a result to the lanes that are on, after output modifiers (omod, clamp).
template <class T>
inline void write(Wave& w, const Instruction& i, const T* result) {
  const Operand& o = i.dst;
  u64 mask = write_lanes(w, i);
  u32 t[kLanes];
  if constexpr (sizeof(T) == 8) {
    for (int l = 0; l < kLanes; l++) t[l] = u32(bits<u64>(result[l]));
    write_register(w, o.index, t, mask);
    for (int l = 0; l < kLanes; l++) t[l] = u32(bits<u64>(result[l]) >> 32);
    write_register(w, o.index + 1, t, mask);
  } else {
    T value[kLanes];
    std::memcpy(value, result, sizeof(value));
    if constexpr (is_float<T>) {
      if (i.omod) {
        f32 factor = i.omod == 1 ? 2.f : i.omod == 2 ? 4.f : 0.5f;
        for (int l = 0; l < kLanes; l++) value[l] = T(f32(value[l]) * factor);
      }
      if (i.clamp)
        for (int l = 0; l < kLanes; l++) value[l] = T(clamp01(f32(value[l])));
    }
    const u32* old = w.v[o.index];
    if constexpr (sizeof(T) == 4) {
      std::memcpy(t, value, sizeof(t));
      if (i.sdwa && i.sdwa_dst != 6)
        for (int l = 0; l < kLanes; l++) t[l] = sdwa_insert(i, t[l], old[l]);
    } else {
      bool high = bit(i.op_sel, 3) || (i.sdwa && i.sdwa_dst == 5);
      bool keep = i.sdwa ? i.sdwa_unused == 2 : !w.clears_high || high;
      for (int l = 0; l < kLanes; l++) {
        u32 other = keep ? old[l] : 0, x = bits<u16>(value[l]);
        t[l] = high ? x << 16 | (other & 0xffff) : x | (other & 0xffff0000);
      }
    }
    write_register(w, o.index, t, mask);
  }
}
