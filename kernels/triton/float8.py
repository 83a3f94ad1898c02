"""Numbers of a float8 cache as operands of the matrix units.

On NVIDIA GPUs the conversion is inline assembly that Triton must take for impure. It then stays where the tile was
loaded, so that 16-bit numbers go to shared memory, where the matrix units' operands are fetched several at a time. A
conversion that Triton understands is moved behind shared memory, from which the float8 values are then fetched byte by
byte: 128 loads a thread for a tile of 128 x 128.

Float8 becomes float16 exactly, two numbers in one instruction; bfloat16 would take three more, and in decode conversion
is what bounds. So bfloat16 queries become float16, too: each row is multiplied by the power of two that brings its
largest number to 2^14, which loses what is 2^-38 of it; the scores get the inverse. Weights are made 2^15 times as
large, up to which float16 holds them, so that those under 2^-29 of the largest begin to lose bits, as those under 1
lose bits in bfloat16; sums and results have the same factor, and the maximum that stands beside them is less by it.
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
WEIGHT_BITS = tl.constexpr(15.0)
"""Log2 of what weights are multiplied by where they become float16."""


@triton.jit
def queries_to_half(q_tile, q_rest_tile, HAS_REST: tl.constexpr):
    """The queries `(BLOCK_M, D)` and their second piece in float16, and the float32 factor of each row's scores."""
    largest = tl.max(tl.abs(q_tile.to(tl.float32)), 1)
    if HAS_REST:
        largest = tl.maximum(largest, tl.max(tl.abs(q_rest_tile.to(tl.float32)), 1))
    # 2^14 over the largest, rounded to a power of two: arithmetic on the bits of its exponent, which 15 keeps in range.
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 15)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    half = (q_tile.to(tl.float32) * up[:, None]).to(tl.float16)
    rest = q_rest_tile
    if HAS_REST:
        rest = (q_rest_tile.to(tl.float32) * up[:, None]).to(tl.float16)
    return half, rest, down


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
        wide = half.to(dtype)
    else:
        wide = tile.to(dtype)
    return wide
