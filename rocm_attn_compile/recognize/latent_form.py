"""Which form a latent attention is computed in, and its spec.

prefill     k_nope and v as the graph computes them, k_pe once for all heads
absorbed    W_uk goes to the queries and W_uv to the result; keys and values are the latent itself
runtime     the op chooses when it knows the sizes
"""

from __future__ import annotations

from ..ops.mla_form import prefers_absorbed
from ..spec import AttentionSpec, LatentSpec
from ..symbolic import Size, product
from .axes import Atom
from .region import Latent


def latent_spec(spec: AttentionSpec, latent: Latent) -> LatentSpec:
    """Sizes of the latent, and the form that the cost rule gives."""
    form, why = form_of(spec, latent)
    return LatentSpec(
        kv_lora_rank=_size(latent.rank),
        qk_nope_head_dim=_size(latent.roles.depth) if latent.w_uk is not None else None,
        qk_rope_head_dim=_size(latent.rope) if latent.rope else 0,
        v_head_dim=_values(spec, latent) if latent.w_uv is not None else None,
        block_size=_size(latent.block[1]) if latent.block is not None and form != "prefill" else None,
        form=form,
        form_reason=why,
    )


def form_of(spec: AttentionSpec, latent: Latent) -> tuple[str, str]:
    """The form, and why."""
    if latent.w_uv is None:
        return "absorbed", "the model is written in it"
    if spec.requires_grad:
        return "prefill", "training: only it has gradients"
    channels = [_size(axis) if axis else 0 for axis in (latent.roles.depth, latent.rope, latent.rank)]
    sizes = [spec.q_len, spec.kv_len, spec.num_heads, *channels, _values(spec, latent)]
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) < len(sizes):
        return "runtime", "sizes are symbols: chosen at every call by the cost rule"
    lower, upper = (bound if isinstance(bound, int) else None for bound in (spec.mask.band_lower, spec.mask.band_upper))
    q_len, kv_len, heads, nope, rope, rank, values = numbers
    absorbed = prefers_absorbed(
        q_len,
        kv_len,
        heads,
        nope,
        rope,
        rank,
        values,
        itemsize=spec.dtype.itemsize,
        band_lower=lower,
        band_upper=upper,
    )
    less = "less" if absorbed else "more"
    return (
        "absorbed" if absorbed else "prefill",
        f"q_len {spec.q_len} on kv_len {spec.kv_len} costs {less} over the latent than over expanded keys",
    )


def _values(spec: AttentionSpec, latent: Latent) -> Size:
    return spec.v_head_dim if latent.tail is None else _size(latent.tail.depth)


def _size(atoms: list[Atom]) -> Size:
    size = product(atom.size for atom in atoms)
    return int(size) if size.is_Integer else size
