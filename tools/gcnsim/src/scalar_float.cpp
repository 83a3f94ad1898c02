// Float arithmetic on scalars, which RDNA 4 has. RDNA4 ISA, "SOP1 Instructions" and "SOP2 Instructions".
#include "operands.h"

namespace {

template <class F>
Handler float2(F) {
  return [](Wave& w, const Instruction& i) {
    f32 x[2];
    for (int k = 0; k < 2; k++) {
      x[k] = bits<f32>(read_scalar(w, i.src[k]));
      if (i.src[k].absolute) x[k] = std::fabs(x[k]);
      if (i.src[k].negate) x[k] = -x[k];
    }
    write_scalar(w, i.dst, bits<u32>(f32(F{}(x[0], x[1]))));
  };
}
template <class F>
Handler convert(F) {
  return [](Wave& w, const Instruction& i) { write_scalar(w, i.dst, F{}(read_scalar(w, i.src[0]))); };
}

}  // namespace

// RDNA 3.5 and 4 have float arithmetic on scalars; the V_S_ ones run on the transcendental unit.
void add_scalar_float(Opcodes& ops) {
  ops.add("s_add_f32", float2([](f32 a, f32 b) { return a + b; }));
  ops.add("s_sub_f32", float2([](f32 a, f32 b) { return a - b; }));
  ops.add("s_mul_f32", float2([](f32 a, f32 b) { return a * b; }));
  ops.add({"s_max_f32", "s_max_num_f32"}, float2([](f32 a, f32 b) { return max_number(a, b); }));
  ops.add({"s_min_f32", "s_min_num_f32"}, float2([](f32 a, f32 b) { return min_number(a, b); }));
  ops.add("s_fmac_f32", [](Wave& w, const Instruction& i) {
    f32 a = bits<f32>(read_scalar(w, i.src[0])), b = bits<f32>(read_scalar(w, i.src[1]));
    write_scalar(w, i.dst, bits<u32>(std::fma(a, b, bits<f32>(read_scalar(w, i.dst)))));
  });
  // FMAMK and FMAAK are written with their operands in the order of the formula: a * b + c.
  ops.add({"s_fmamk_f32", "s_fmaak_f32"}, [](Wave& w, const Instruction& i) {
    f32 x[3];
    for (int k = 0; k < 3; k++) x[k] = bits<f32>(read_scalar(w, i.src[k]));
    write_scalar(w, i.dst, bits<u32>(std::fma(x[0], x[1], x[2])));
  });
  ops.add("s_trunc_f32", convert([](u32 a) { return bits<u32>(std::trunc(bits<f32>(a))); }));
  ops.add("s_floor_f32", convert([](u32 a) { return bits<u32>(std::floor(bits<f32>(a))); }));
  ops.add("s_ceil_f32", convert([](u32 a) { return bits<u32>(std::ceil(bits<f32>(a))); }));
  ops.add("s_rndne_f32", convert([](u32 a) { return bits<u32>(std::nearbyint(bits<f32>(a))); }));
  ops.add("s_cvt_f32_f16", convert([](u32 a) { return bits<u32>(half_to_float(u16(a))); }));
  ops.add("s_cvt_hi_f32_f16", convert([](u32 a) { return bits<u32>(half_to_float(u16(a >> 16))); }));
  ops.add("s_cvt_f16_f32", convert([](u32 a) { return u32(float_to_half(bits<f32>(a))); }));
  ops.add("s_cvt_f32_u32", convert([](u32 a) { return bits<u32>(f32(a)); }));
  ops.add("s_cvt_f32_i32", convert([](u32 a) { return bits<u32>(f32(i32(a))); }));
  ops.add("s_cvt_u32_f32", convert([](u32 a) { return saturate_u32(bits<f32>(a)); }));
  ops.add("s_cvt_i32_f32", convert([](u32 a) { return u32(saturate_i32(bits<f32>(a))); }));
  ops.add("v_s_rcp_f32", convert([](u32 a) { return bits<u32>(1.f / bits<f32>(a)); }));
  ops.add("v_s_exp_f32", convert([](u32 a) { return bits<u32>(flush(std::exp2(bits<f32>(a)))); }));
  ops.add("v_s_log_f32", convert([](u32 a) { return bits<u32>(std::log2(flush(bits<f32>(a)))); }));
  ops.add("v_s_sqrt_f32", convert([](u32 a) { return bits<u32>(std::sqrt(bits<f32>(a))); }));
}
