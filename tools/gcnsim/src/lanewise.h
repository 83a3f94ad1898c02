// Handlers of instructions that are one function per lane of one, two or three sources.
#pragma once

#include "operands.h"

template <class R, class A, class F>
Handler unary(F) {
  return [](Wave& w, const Instruction& i) {
    A a[kLanes];
    R r[kLanes];
    read(w, i, 0, a);
    for (int l = 0; l < kLanes; l++) r[l] = F{}(a[l]);
    write(w, i, r);
  };
}

template <class R, class A, class B, class F>
Handler binary(F) {
  return [](Wave& w, const Instruction& i) {
    A a[kLanes];
    B b[kLanes];
    R r[kLanes];
    read(w, i, 0, a);
    read(w, i, 1, b);
    for (int l = 0; l < kLanes; l++) r[l] = F{}(a[l], b[l]);
    write(w, i, r);
  };
}

template <class R, class A, class B, class C, class F>
Handler ternary(F) {
  return [](Wave& w, const Instruction& i) {
    A a[kLanes];
    B b[kLanes];
    C c[kLanes];
    R r[kLanes];
    read(w, i, 0, a);
    read(w, i, 1, b);
    read(w, i, 2, c);
    for (int l = 0; l < kLanes; l++) r[l] = F{}(a[l], b[l], c[l]);
    write(w, i, r);
  };
}

// The destination's old value as an operand (V_FMAC and others).
template <class T>
inline void read_old(Wave& w, const Instruction& i, T* out) {
  u32 index = i.dst.index;
  if constexpr (sizeof(T) == 8) {
    for (int l = 0; l < kLanes; l++) out[l] = bits<T>(u64(w.v[index + 1][l]) << 32 | w.v[index][l]);
  } else if constexpr (sizeof(T) == 4) {
    std::memcpy(out, w.v[index], sizeof(w.v[index]));
  } else {
    for (int l = 0; l < kLanes; l++) out[l] = bits<T>(u16(w.v[index][l] >> (bit(i.op_sel, 3) ? 16 : 0)));
  }
}

// As `ternary`, the third source being the destination's old value.
template <class R, class A, class B, class F>
Handler accumulate(F) {
  return [](Wave& w, const Instruction& i) {
    A a[kLanes];
    B b[kLanes];
    R c[kLanes], r[kLanes];
    read(w, i, 0, a);
    read(w, i, 1, b);
    read_old(w, i, c);
    for (int l = 0; l < kLanes; l++) r[l] = F{}(a[l], b[l], c[l]);
    write(w, i, r);
  };
}
