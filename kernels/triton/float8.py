"""Numbers of a float8 cache as operands of the matrix units.

On NVIDIA GPUs the conversion is inline assembly that Triton must take for impure. It then stays where the tile was
loaded, so that 16-bit numbers go to shared memory, where the matrix units' operands are fetched several at a time. A
conversion that Triton understands is moved behind shared memory, from which the float8 values are then fetched byte by
byte: 128 loads a thread for a tile of 128 x 128.
"""

import triton
import triton.language as tl


def _assembly(text: str) -> tl.constexpr:
    """On one line: Inductor writes it into its program as a string inside of another, where a newline ends it."""
    return tl.constexpr(" ".join(text.split()))


_TO_F16 = _assembly("""
{
.reg .b16 a, b;
mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
}
""")
_E5M2_TO_F16 = _assembly("""
{
.reg .b32 zero;
mov.b32 zero, 0;
prmt.b32 $0, zero, $2, 0x5040;
prmt.b32 $1, zero, $2, 0x7060;
}
""")
_F16_TO_BF16 = _assembly("""
{
.reg .b16 a, b;
.reg .f32 x, y;
mov.b32 {a, b}, $2;
cvt.f32.f16 x, a;
cvt.f32.f16 y, b;
cvt.rn.bf16x2.f32 $0, y, x;
mov.b32 {a, b}, $3;
cvt.f32.f16 x, a;
cvt.f32.f16 y, b;
cvt.rn.bf16x2.f32 $1, y, x;
}
""")


@triton.jit
def widen(tile, dtype: tl.constexpr, ASM: tl.constexpr):
    """The tile in `dtype`, fp16 or bf16 for a tile of float8; ASM: on an NVIDIA GPU, see configs.converts_in_place."""
    if tile.dtype == dtype:
        wide = tile
    elif ASM and (tile.dtype == tl.float8e4nv or tile.dtype == tl.float8e5):
        if tile.dtype == tl.float8e4nv:
            half = tl.inline_asm_elementwise(_TO_F16, "=r,=r,r", [tile], tl.float16, is_pure=False, pack=4)
        else:
            half = tl.inline_asm_elementwise(_E5M2_TO_F16, "=r,=r,r", [tile], tl.float16, is_pure=False, pack=4)
        if dtype == tl.bfloat16:
            wide = tl.inline_asm_elementwise(_F16_TO_BF16, "=r,=r,r,r", [half], tl.bfloat16, is_pure=False, pack=4)
        else:
            wide = half
    else:
        wide = tile.to(dtype)
    return wide
