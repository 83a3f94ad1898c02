// Scalar ALU: SOP1, SOP2 and SOPK. AMD CDNA3 ISA 12.1 to 12.3, RDNA3 ISA 16.1 to 16.3 (which renames some).
#include "operands.h"

namespace {

// Results of one, two scalar sources; the function may set w.scc.
template <class F>
Handler scalar1(F) {
  return [](Wave& w, const Instruction& i) { write_scalar(w, i.dst, F{}(w, read_scalar(w, i.src[0]))); };
}
template <class F>
Handler scalar2(F) {
  return [](Wave& w, const Instruction& i) {
    write_scalar(w, i.dst, F{}(w, read_scalar(w, i.src[0]), read_scalar(w, i.src[1])));
  };
}
template <class F>
Handler pair1(F) {
  return [](Wave& w, const Instruction& i) { write_pair(w, i.dst, F{}(w, read_pair(w, i.src[0]))); };
}
template <class F>
Handler pair2(F) {
  return [](Wave& w, const Instruction& i) {
    write_pair(w, i.dst, F{}(w, read_pair(w, i.src[0]), read_pair(w, i.src[1])));
  };
}
// 64-bit value, 32-bit amount.
template <class F>
Handler pair_shift(F) {
  return [](Wave& w, const Instruction& i) {
    u64 r = F{}(read_pair(w, i.src[0]), read_scalar(w, i.src[1]));
    write_pair(w, i.dst, r);
    w.scc = r != 0;
  };
}
// Bitwise operation on 32 or 64 bits, SCC is "not zero".
template <class F>
Handler logic32(F) {
  return [](Wave& w, const Instruction& i) {
    u32 r = u32(F{}(u64(read_scalar(w, i.src[0])), u64(read_scalar(w, i.src[1]))));
    write_scalar(w, i.dst, r);
    w.scc = r != 0;
  };
}
template <class F>
Handler logic64(F) {
  return [](Wave& w, const Instruction& i) {
    u64 r = F{}(read_pair(w, i.src[0]), read_pair(w, i.src[1]));
    write_pair(w, i.dst, r);
    w.scc = r != 0;
  };
}
// S_*_SAVEEXEC: the old EXEC goes to the destination, the new one is a function of source and EXEC.
template <class F>
void add_saveexec(Opcodes& ops, const char* name, F) {
  std::string stem = std::string("s_") + name + "_saveexec_";
  ops.add((stem + "b64").c_str(), [](Wave& w, const Instruction& i) {
    u64 source = read_pair(w, i.src[0]), old = w.exec(), r = F{}(source, old);
    write_pair(w, i.dst, old);
    w.set_exec(r);
    w.scc = r != 0;
  });
  ops.add((stem + "b32").c_str(), [](Wave& w, const Instruction& i) {
    u32 source = read_scalar(w, i.src[0]), old = u32(w.exec()), r = u32(F{}(u64(source), u64(old)));
    write_scalar(w, i.dst, old);
    w.set_exec(r);
    w.scc = r != 0;
  });
}

template <int Shift>
u32 shift_add(Wave& w, u32 a, u32 b) {
  u64 t = (u64(a) << Shift) + b;
  w.scc = (t >> 32) != 0;
  return u32(t);
}

i32 small(u32 k) { return i16(k); }

void add_moves(Opcodes& ops) {
  ops.add("s_mov_b32", scalar1([](Wave&, u32 a) { return a; }));
  ops.add("s_mov_b64", pair1([](Wave&, u64 a) { return a; }));
  ops.add("s_not_b32", scalar1([](Wave& w, u32 a) {
            w.scc = ~a != 0;
            return ~a;
          }));
  ops.add("s_not_b64", pair1([](Wave& w, u64 a) {
            w.scc = ~a != 0;
            return ~a;
          }));
  ops.add("s_brev_b32", scalar1([](Wave&, u32 a) { return reverse_bits(a); }));
  ops.add("s_abs_i32", scalar1([](Wave& w, u32 a) {
            u32 r = i32(a) < 0 ? 0u - a : a;
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_sext_i32_i16", scalar1([](Wave&, u32 a) { return u32(i32(i16(a))); }));
  ops.add("s_sext_i32_i8", scalar1([](Wave&, u32 a) { return u32(i32(i8(a))); }));
  ops.add("s_bcnt1_i32_b32", scalar1([](Wave& w, u32 a) {
            u32 r = __builtin_popcount(a);
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_bcnt1_i32_b64", [](Wave& w, const Instruction& i) {
    u32 r = __builtin_popcountll(read_pair(w, i.src[0]));
    write_scalar(w, i.dst, r);
    w.scc = r != 0;
  });
  ops.add({"s_flbit_i32_b32", "s_clz_i32_u32"}, scalar1([](Wave&, u32 a) { return a ? u32(__builtin_clz(a)) : ~0u; }));
  ops.add({"s_ff1_i32_b32", "s_ctz_i32_b32"}, scalar1([](Wave&, u32 a) { return a ? u32(__builtin_ctz(a)) : ~0u; }));
  ops.add({"s_ff1_i32_b64", "s_ctz_i32_b64"}, [](Wave& w, const Instruction& i) {
    u64 a = read_pair(w, i.src[0]);
    write_scalar(w, i.dst, a ? u32(__builtin_ctzll(a)) : ~0u);
  });
  ops.add("s_movk_i32", scalar1([](Wave&, u32 a) { return u32(small(a)); }));
  ops.add("s_cmovk_i32", [](Wave& w, const Instruction& i) {
    if (w.scc) write_scalar(w, i.dst, u32(small(read_scalar(w, i.src[0]))));
  });
  ops.add("s_cmov_b32", [](Wave& w, const Instruction& i) {
    if (w.scc) write_scalar(w, i.dst, read_scalar(w, i.src[0]));
  });
  ops.add("s_cmov_b64", [](Wave& w, const Instruction& i) {
    if (w.scc) write_pair(w, i.dst, read_pair(w, i.src[0]));
  });
  ops.add("s_cselect_b32", scalar2([](Wave& w, u32 a, u32 b) { return w.scc ? a : b; }));
  ops.add("s_cselect_b64", pair2([](Wave& w, u64 a, u64 b) { return w.scc ? a : b; }));
}

void add_arithmetic(Opcodes& ops) {
  ops.add({"s_add_u32", "s_add_co_u32"}, scalar2([](Wave& w, u32 a, u32 b) {
            u64 t = u64(a) + b;
            w.scc = u32(t >> 32);
            return u32(t);
          }));
  ops.add({"s_addc_u32", "s_add_co_ci_u32"}, scalar2([](Wave& w, u32 a, u32 b) {
            u64 t = u64(a) + b + w.scc;
            w.scc = u32(t >> 32);
            return u32(t);
          }));
  ops.add({"s_sub_u32", "s_sub_co_u32"}, scalar2([](Wave& w, u32 a, u32 b) {
            w.scc = b > a;
            return a - b;
          }));
  ops.add({"s_subb_u32", "s_sub_co_ci_u32"}, scalar2([](Wave& w, u32 a, u32 b) {
            u64 t = u64(b) + w.scc;
            w.scc = t > a;
            return a - u32(t);
          }));
  ops.add({"s_add_i32", "s_add_co_i32"}, scalar2([](Wave& w, u32 a, u32 b) {
            i64 t = i64(i32(a)) + i32(b);
            w.scc = t != i32(t);
            return u32(t);
          }));
  ops.add({"s_sub_i32", "s_sub_co_i32"}, scalar2([](Wave& w, u32 a, u32 b) {
            i64 t = i64(i32(a)) - i32(b);
            w.scc = t != i32(t);
            return u32(t);
          }));
  ops.add({"s_add_nc_u64", "s_add_u64"}, pair2([](Wave&, u64 a, u64 b) { return a + b; }));
  ops.add({"s_sub_nc_u64", "s_sub_u64"}, pair2([](Wave&, u64 a, u64 b) { return a - b; }));
  ops.add("s_mul_u64", pair2([](Wave&, u64 a, u64 b) { return a * b; }));
  ops.add({"s_addk_i32", "s_addk_co_i32"}, [](Wave& w, const Instruction& i) {
    i64 t = i64(i32(read_scalar(w, i.dst))) + small(read_scalar(w, i.src[0]));
    write_scalar(w, i.dst, u32(t));
    w.scc = t != i32(t);
  });
  ops.add("s_mulk_i32", [](Wave& w, const Instruction& i) {
    write_scalar(w, i.dst, read_scalar(w, i.dst) * u32(small(read_scalar(w, i.src[0]))));
  });
  ops.add("s_mul_i32", scalar2([](Wave&, u32 a, u32 b) { return a * b; }));
  ops.add("s_mul_hi_u32", scalar2([](Wave&, u32 a, u32 b) { return u32(u64(a) * b >> 32); }));
  ops.add("s_mul_hi_i32", scalar2([](Wave&, u32 a, u32 b) { return u32(i64(i32(a)) * i32(b) >> 32); }));
  ops.add("s_min_i32", scalar2([](Wave& w, u32 a, u32 b) {
            w.scc = i32(a) < i32(b);
            return w.scc ? a : b;
          }));
  ops.add("s_max_i32", scalar2([](Wave& w, u32 a, u32 b) {
            w.scc = i32(a) >= i32(b);
            return w.scc ? a : b;
          }));
  ops.add("s_min_u32", scalar2([](Wave& w, u32 a, u32 b) {
            w.scc = a < b;
            return w.scc ? a : b;
          }));
  ops.add("s_max_u32", scalar2([](Wave& w, u32 a, u32 b) {
            w.scc = a >= b;
            return w.scc ? a : b;
          }));
  ops.add("s_absdiff_i32", scalar2([](Wave& w, u32 a, u32 b) {
            i64 t = i64(i32(a)) - i32(b);
            u32 r = u32(t < 0 ? -t : t);
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_lshl1_add_u32", scalar2([](Wave& w, u32 a, u32 b) { return shift_add<1>(w, a, b); }));
  ops.add("s_lshl2_add_u32", scalar2([](Wave& w, u32 a, u32 b) { return shift_add<2>(w, a, b); }));
  ops.add("s_lshl3_add_u32", scalar2([](Wave& w, u32 a, u32 b) { return shift_add<3>(w, a, b); }));
  ops.add("s_lshl4_add_u32", scalar2([](Wave& w, u32 a, u32 b) { return shift_add<4>(w, a, b); }));
}

template <class F>
void add_logic_pair(Opcodes& ops, const char* narrow, const char* wide, F f) {
  ops.add(narrow, logic32(f));
  ops.add(wide, logic64(f));
}

void add_bits(Opcodes& ops) {
  add_logic_pair(ops, "s_and_b32", "s_and_b64", [](u64 a, u64 b) { return a & b; });
  add_logic_pair(ops, "s_or_b32", "s_or_b64", [](u64 a, u64 b) { return a | b; });
  add_logic_pair(ops, "s_xor_b32", "s_xor_b64", [](u64 a, u64 b) { return a ^ b; });
  add_logic_pair(ops, "s_nand_b32", "s_nand_b64", [](u64 a, u64 b) { return ~(a & b); });
  add_logic_pair(ops, "s_nor_b32", "s_nor_b64", [](u64 a, u64 b) { return ~(a | b); });
  add_logic_pair(ops, "s_xnor_b32", "s_xnor_b64", [](u64 a, u64 b) { return ~(a ^ b); });
  add_logic_pair(ops, "s_andn2_b32", "s_andn2_b64", [](u64 a, u64 b) { return a & ~b; });
  add_logic_pair(ops, "s_and_not1_b32", "s_and_not1_b64", [](u64 a, u64 b) { return a & ~b; });
  add_logic_pair(ops, "s_orn2_b32", "s_orn2_b64", [](u64 a, u64 b) { return a | ~b; });
  add_logic_pair(ops, "s_or_not1_b32", "s_or_not1_b64", [](u64 a, u64 b) { return a | ~b; });
  ops.add("s_lshl_b32", scalar2([](Wave& w, u32 a, u32 b) {
            u32 r = a << (b & 31);
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_lshr_b32", scalar2([](Wave& w, u32 a, u32 b) {
            u32 r = a >> (b & 31);
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_ashr_i32", scalar2([](Wave& w, u32 a, u32 b) {
            u32 r = u32(i32(a) >> (b & 31));
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_lshl_b64", pair_shift([](u64 a, u32 b) { return a << (b & 63); }));
  ops.add("s_lshr_b64", pair_shift([](u64 a, u32 b) { return a >> (b & 63); }));
  ops.add("s_ashr_i64", pair_shift([](u64 a, u32 b) { return u64(i64(a) >> (b & 63)); }));
  // Bit fields: offset in bits 4:0 (5:0 for 64 bits), width in bits 22:16.
  ops.add("s_bfe_u32", scalar2([](Wave& w, u32 a, u32 b) {
            u32 width = b >> 16 & 127, shifted = a >> (b & 31),
                r = width == 0    ? 0
                    : width >= 32 ? shifted
                                  : shifted & ((1u << width) - 1);
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_bfe_i32", scalar2([](Wave& w, u32 a, u32 b) {
            u32 r = u32(signed_field(i32(a), b & 31, b >> 16 & 127));
            w.scc = r != 0;
            return r;
          }));
  ops.add("s_bfe_u64", pair_shift([](u64 a, u32 b) {
            u32 width = b >> 16 & 127;
            u64 shifted = a >> (b & 63);
            return width == 0 ? 0 : width >= 64 ? shifted : shifted & ((1ull << width) - 1);
          }));
  ops.add("s_bfe_i64", pair_shift([](u64 a, u32 b) { return u64(signed_field(i64(a), b & 63, b >> 16 & 127)); }));
  ops.add("s_bfm_b32", scalar2([](Wave&, u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); }));
  ops.add("s_pack_ll_b32_b16", scalar2([](Wave&, u32 a, u32 b) { return (a & 0xffff) | b << 16; }));
  ops.add("s_pack_lh_b32_b16", scalar2([](Wave&, u32 a, u32 b) { return (a & 0xffff) | (b & 0xffff0000); }));
  ops.add("s_pack_hh_b32_b16", scalar2([](Wave&, u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); }));
  ops.add("s_bitset1_b32", [](Wave& w, const Instruction& i) {
    write_scalar(w, i.dst, read_scalar(w, i.dst) | 1u << (read_scalar(w, i.src[0]) & 31));
  });
  ops.add("s_bitset0_b32", [](Wave& w, const Instruction& i) {
    write_scalar(w, i.dst, read_scalar(w, i.dst) & ~(1u << (read_scalar(w, i.src[0]) & 31)));
  });
  add_saveexec(ops, "and", [](u64 a, u64 exec) { return a & exec; });
  add_saveexec(ops, "or", [](u64 a, u64 exec) { return a | exec; });
  add_saveexec(ops, "xor", [](u64 a, u64 exec) { return a ^ exec; });
  add_saveexec(ops, "andn1", [](u64 a, u64 exec) { return ~a & exec; });
  add_saveexec(ops, "and_not0", [](u64 a, u64 exec) { return ~a & exec; });
  add_saveexec(ops, "andn2", [](u64 a, u64 exec) { return a & ~exec; });
  add_saveexec(ops, "and_not1", [](u64 a, u64 exec) { return a & ~exec; });
  add_saveexec(ops, "orn1", [](u64 a, u64 exec) { return ~a | exec; });
  add_saveexec(ops, "or_not0", [](u64 a, u64 exec) { return ~a | exec; });
}

}  // namespace

void add_scalar(Opcodes& ops) {
  add_moves(ops);
  add_arithmetic(ops);
  add_bits(ops);
}
