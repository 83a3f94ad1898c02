"""ROCM_AITER_FA: AITER's CK and assembly flash attention (`flash_attn_func`, `flash_attn_varlen_func`).

AITER 0.1.20: masks and windows are aligned bottom-right, a row without a key is 0, the soft cap exists in the varlen
function only and its backward never sees it. Its alibi_slopes are float32, (H,) or (B, H), as ours; how it aligns the
distance, and what a causal mask makes of it, is not documented, so ALiBi is not declared. gfx90a passes the documented
gate for choosing it, but AITER has no kernels for gfx90a, so there the choice falls back.
"""

import torch

from .base import AttentionBackend, Dims
from .limits import BLOCK_SIZE_16, SOFT_CAP_FORWARD_ONLY, WINDOW_BOTTOM_RIGHT

HEAD_DIMS = Dims(listed=(64, 128, 256))

BACKEND = AttentionBackend(
    name="ROCM_AITER_FA",
    summary="AITER's CK and assembly flash attention: prefill and training on MI300 and MI350",
    built=False,
    kinds=frozenset({"attention"}),
    archs=("gfx942", "gfx950"),
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=HEAD_DIMS,
    v_head_dims=HEAD_DIMS,
    takes=frozenset(
        {
            "gqa",
            "logits_soft_cap",
            "training",
            "band_upper",
            "band_lower",
            "empty_rows_zero",
            "decode",
            "paged_kv",
            "float8_kv",
            "kv_scale",
            "symbolic_lengths",
        }
    ),
    limits=(WINDOW_BOTTOM_RIGHT, SOFT_CAP_FORWARD_ONLY, BLOCK_SIZE_16),
    package="aiter",
)
