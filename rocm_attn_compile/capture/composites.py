"""Attention-bearing calls that Dynamo leaves whole, as plain torch functions of the same arguments.

`expand` traces these and puts the result in the graph, so that the attention inside becomes visible.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rocm_attn_compile import _torch_private as private

# Values of `mask_type`, as nn.MultiheadAttention.merge_masks makes them.
_ATTENTION_MASK, _KEY_PADDING_MASK = 0, 1


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What nn.TransformerEncoderLayer's inference fast path computes, in separate calls.

    Args:
        src: `(batch, q_len, embed_dim)`; every dimension may be dynamic.
        mask: Nonzero hides a key, whatever its dtype: `(q_len, q_len)`, `(batch, q_len)` or
            `(batch, num_heads, q_len, q_len)` for `mask_type` 0, 1 and 2. A row of hidden keys only gives NaN.

    The other arguments are those of `torch._transformer_encoder_layer_fwd`.
    """

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    qkv = F.linear(x, qkv_weight, qkv_bias)
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    if mask is None:
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        if mask_type == _ATTENTION_MASK:
            mask = mask[None, None]
        elif mask_type == _KEY_PADDING_MASK:
            mask = mask[:, None, None, :]
        scores = (q / math.sqrt(embed_dim // num_heads)) @ k.transpose(-1, -2)
        attended = scores.masked_fill(mask.bool(), -math.inf).softmax(-1) @ v
    x = src + F.linear(attended.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not norm_first:
        x = norm(x, norm_weight_1, norm_bias_1)
    hidden = norm(x, norm_weight_2, norm_bias_2) if norm_first else x
    hidden = F.linear(hidden, ffn_weight_1, ffn_bias_1)
    x = x + F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)


COMPOSITES: dict[Callable, Callable] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    private.transformer_encoder_layer_fwd: transformer_encoder_layer,
}
"""Call target -> function to trace in its place."""

IGNORES_AUTOCAST = frozenset({private.transformer_encoder_layer_fwd})
"""Composites that run in their inputs' dtype under autocast, which their parts would not."""
