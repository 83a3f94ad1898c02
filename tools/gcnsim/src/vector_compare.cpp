// Vector compares (VOPC): one bit per lane into VCC or an SGPR pair, or into EXEC. AMD CDNA3 ISA 12.9, RDNA3 ISA 16.10.
#include "operands.h"

namespace {

template <class T, bool IntoExec, class F>
Handler compare(F) {
  return [](Wave& w, const Instruction& i) {
    T a[kLanes], b[kLanes];
    read(w, i, 0, a);
    read(w, i, 1, b);
    u64 mask = 0;
    for (int l = 0; l < kLanes; l++) mask |= u64(F{}(a[l], b[l])) << l;
    mask &= w.exec();
    if (!IntoExec || i.dst.kind) write_mask(w, i.dst, mask);
    if (IntoExec) w.set_exec(mask);
  };
}

template <class T, class F>
void add(Opcodes& ops, const char* relation, const char* type, F f) {
  std::string name = std::string(relation) + "_" + type;
  ops.add(("v_cmp_" + name).c_str(), compare<T, false>(f));
  ops.add(("v_cmpx_" + name).c_str(), compare<T, true>(f));
}

template <class T>
void add_integer(Opcodes& ops, const char* type) {
  add<T>(ops, "lt", type, [](T a, T b) { return a < b; });
  add<T>(ops, "eq", type, [](T a, T b) { return a == b; });
  add<T>(ops, "le", type, [](T a, T b) { return a <= b; });
  add<T>(ops, "gt", type, [](T a, T b) { return a > b; });
  add<T>(ops, "ne", type, [](T a, T b) { return a != b; });
  add<T>(ops, "ge", type, [](T a, T b) { return a >= b; });
}

template <class T, class C>
void add_float(Opcodes& ops, const char* type) {
  add<T>(ops, "lt", type, [](C a, C b) { return a < b; });
  add<T>(ops, "eq", type, [](C a, C b) { return a == b; });
  add<T>(ops, "le", type, [](C a, C b) { return a <= b; });
  add<T>(ops, "gt", type, [](C a, C b) { return a > b; });
  add<T>(ops, "lg", type, [](C a, C b) { return a < b || a > b; });
  add<T>(ops, "ge", type, [](C a, C b) { return a >= b; });
  add<T>(ops, "o", type, [](C a, C b) { return a == a && b == b; });
  add<T>(ops, "u", type, [](C a, C b) { return a != a || b != b; });
  add<T>(ops, "nge", type, [](C a, C b) { return !(a >= b); });
  add<T>(ops, "nlg", type, [](C a, C b) { return !(a < b || a > b); });
  add<T>(ops, "ngt", type, [](C a, C b) { return !(a > b); });
  add<T>(ops, "nle", type, [](C a, C b) { return !(a <= b); });
  add<T>(ops, "neq", type, [](C a, C b) { return !(a == b); });
  add<T>(ops, "nlt", type, [](C a, C b) { return !(a < b); });
}

// Bits of the class mask: signalling NaN, quiet NaN, -inf, -normal, -subnormal, -0, +0, +subnormal, +normal, +inf.
bool in_class(f32 x, u32 classes) {
  u32 b = bits<u32>(x);
  bool negative = b >> 31;
  if (x != x) return classes & (b & 0x400000 ? 2 : 1);
  if (std::isinf(x)) return classes & (negative ? 4 : 0x200);
  if (x == 0) return classes & (negative ? 0x20 : 0x40);
  if (!(b >> 23 & 255)) return classes & (negative ? 0x10 : 0x80);
  return classes & (negative ? 8 : 0x100);
}

template <bool IntoExec>
void compare_class(Wave& w, const Instruction& i) {
  f32 a[kLanes];
  u32 b[kLanes];
  read(w, i, 0, a);
  read(w, i, 1, b);
  u64 mask = 0;
  for (int l = 0; l < kLanes; l++) mask |= u64(in_class(a[l], b[l])) << l;
  mask &= w.exec();
  if (!IntoExec || i.dst.kind) write_mask(w, i.dst, mask);
  if (IntoExec) w.set_exec(mask);
}

}  // namespace

void add_vector_compare(Opcodes& ops) {
  add_integer<i32>(ops, "i32");
  add_integer<u32>(ops, "u32");
  add_integer<i64>(ops, "i64");
  add_integer<u64>(ops, "u64");
  add_integer<i16>(ops, "i16");
  add_integer<u16>(ops, "u16");
  add_float<f32, f32>(ops, "f32");
  add_float<Half, f32>(ops, "f16");
  add_float<f64, f64>(ops, "f64");
  ops.add("v_cmp_class_f32", compare_class<false>);
  ops.add("v_cmpx_class_f32", compare_class<true>);
}
