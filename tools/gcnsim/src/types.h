// Short names for the machine's types, and reinterpretation of bits.
#pragma once

#include <cstdint>
#include <cstring>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using f32 = float;
using f64 = double;

// The same bits as another type; std::bit_cast for gcc 10 as well.
template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
