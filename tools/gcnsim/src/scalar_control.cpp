// Scalar compares, branches, barriers and the end of a program: SOPC, SOPP and S_CMPK. AMD CDNA3 ISA 12.2, 12.4
// and 12.5; RDNA3 ISA 16.2, 16.4 and 16.5.
#include "operands.h"

namespace {

template <class F>
Handler compare(F) {
  return [](Wave& w, const Instruction& i) { w.scc = F{}(read_scalar(w, i.src[0]), read_scalar(w, i.src[1])); };
}
// S_CMPK: the constant is 16 bits, extended as T is signed or not.
template <class T, class F>
Handler compare_constant(F) {
  return [](Wave& w, const Instruction& i) {
    u32 k = read_scalar(w, i.src[1]);
    w.scc = F{}(T(read_scalar(w, i.src[0])), std::is_signed_v<T> ? T(i16(k)) : T(k & 0xffff));
  };
}
template <class F>
Handler float_compare(F) {
  return [](Wave& w, const Instruction& i) {
    w.scc = F{}(bits<f32>(read_scalar(w, i.src[0])), bits<f32>(read_scalar(w, i.src[1])));
  };
}
template <class F>
void add_compare(Opcodes& ops, const char* relation, F f) {
  std::string name(relation);
  ops.add(("s_cmp_" + name + "_u32").c_str(), compare([](u32 a, u32 b) { return F{}(a, b); }));
  ops.add(("s_cmp_" + name + "_i32").c_str(), compare([](u32 a, u32 b) { return F{}(i32(a), i32(b)); }));
  ops.add(("s_cmpk_" + name + "_u32").c_str(), compare_constant<u32>(f));
  ops.add(("s_cmpk_" + name + "_i32").c_str(), compare_constant<i32>(f));
  ops.add(("s_cmp_" + name + "_f32").c_str(), float_compare(f));
}

void add_compares(Opcodes& ops) {
  add_compare(ops, "eq", [](auto a, auto b) { return a == b; });
  add_compare(ops, "lg", [](auto a, auto b) { return a < b || a > b; });
  add_compare(ops, "gt", [](auto a, auto b) { return a > b; });
  add_compare(ops, "ge", [](auto a, auto b) { return a >= b; });
  add_compare(ops, "lt", [](auto a, auto b) { return a < b; });
  add_compare(ops, "le", [](auto a, auto b) { return a <= b; });
  ops.add("s_cmp_neq_f32", float_compare([](f32 a, f32 b) { return !(a == b); }));
  ops.add("s_cmp_nlt_f32", float_compare([](f32 a, f32 b) { return !(a < b); }));
  ops.add("s_cmp_ngt_f32", float_compare([](f32 a, f32 b) { return !(a > b); }));
  ops.add("s_cmp_nge_f32", float_compare([](f32 a, f32 b) { return !(a >= b); }));
  ops.add("s_cmp_nle_f32", float_compare([](f32 a, f32 b) { return !(a <= b); }));
  ops.add("s_cmp_o_f32", float_compare([](f32 a, f32 b) { return a == a && b == b; }));
  ops.add("s_cmp_u_f32", float_compare([](f32 a, f32 b) { return a != a || b != b; }));
  ops.add("s_cmp_eq_u64",
          [](Wave& w, const Instruction& i) { w.scc = read_pair(w, i.src[0]) == read_pair(w, i.src[1]); });
  ops.add("s_cmp_lg_u64",
          [](Wave& w, const Instruction& i) { w.scc = read_pair(w, i.src[0]) != read_pair(w, i.src[1]); });
  ops.add("s_bitcmp0_b32", compare([](u32 a, u32 b) { return !(a >> (b & 31) & 1); }));
  ops.add("s_bitcmp1_b32", compare([](u32 a, u32 b) { return a >> (b & 31) & 1; }));
  ops.add("s_bitcmp0_b64",
          [](Wave& w, const Instruction& i) { w.scc = !bit(read_pair(w, i.src[0]), read_scalar(w, i.src[1]) & 63); });
  ops.add("s_bitcmp1_b64",
          [](Wave& w, const Instruction& i) { w.scc = bit(read_pair(w, i.src[0]), read_scalar(w, i.src[1]) & 63); });
}

}  // namespace

// Branches, the end, barriers, and what has no effect that is modelled (waits, hints, caches, MODE).
void add_scalar_control(Opcodes& ops) {
  add_compares(ops);
  ops.add("s_nop", [](Wave&, const Instruction&) {});
  ops.add("s_endpgm", [](Wave& w, const Instruction&) { w.state = kEnded; });
  ops.add({"s_barrier", "s_barrier_wait"}, [](Wave& w, const Instruction&) {
    w.state = kAtBarrier;
    w.epoch++;
  });
  ops.add("s_branch", [](Wave& w, const Instruction& i) { w.pc = i.target; });
  ops.add("s_cbranch_scc0", [](Wave& w, const Instruction& i) {
    if (!w.scc) w.pc = i.target;
  });
  ops.add("s_cbranch_scc1", [](Wave& w, const Instruction& i) {
    if (w.scc) w.pc = i.target;
  });
  ops.add("s_cbranch_vccz", [](Wave& w, const Instruction& i) {
    if (!w.vcc()) w.pc = i.target;
  });
  ops.add("s_cbranch_vccnz", [](Wave& w, const Instruction& i) {
    if (w.vcc()) w.pc = i.target;
  });
  ops.add("s_cbranch_execz", [](Wave& w, const Instruction& i) {
    if (!w.exec()) w.pc = i.target;
  });
  ops.add("s_cbranch_execnz", [](Wave& w, const Instruction& i) {
    if (w.exec()) w.pc = i.target;
  });
  ops.add("s_getpc_b64", [](Wave& w, const Instruction& i) {
    if (!i.address) w.error(kUnsupported, i, 0, 0);  // a program from text has no addresses
    write_pair(w, i.dst, i.address + 4);
  });
  ops.add("s_getreg_b32", [](Wave& w, const Instruction& i) { write_scalar(w, i.dst, 0); });
  ops.add({"s_memtime", "s_memrealtime", "s_getreg_time"},
          [](Wave& w, const Instruction& i) { write_pair(w, i.dst, w.executed); });
}
