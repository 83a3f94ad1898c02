"""The declarations as tables: for `rocm-attn backends`, and for docs/backends.md, which is generated from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import BACKENDS
from .base import BASE_CODES, AttentionBackend
from .features import FEATURES
from .words import dtype_name

HEADER = ("backend", "built", "for", "architectures", "dtypes", "head_dim", "needs")


def backend_row(backend: AttentionBackend) -> tuple[str, ...]:
    """One line of the overview, as `HEADER`."""
    head_dims, v_head_dims = str(backend.head_dims), str(backend.v_head_dims)
    return (
        backend.name,
        "yes" if backend.built else "not yet",
        ", ".join(sorted(backend.kinds)),
        ", ".join({"*": "any GPU", "gfx*": "any AMD GPU"}.get(arch, arch) for arch in backend.archs),
        ", ".join(map(dtype_name, backend.dtypes)),
        head_dims if head_dims == v_head_dims else f"{head_dims}; values {v_head_dims}",
        backend.package or "-",
    )


def backend_data(backend: AttentionBackend) -> dict[str, Any]:
    """The declaration as JSON-able data."""
    return {
        "name": backend.name,
        "summary": backend.summary,
        "built": backend.built,
        "kinds": sorted(backend.kinds),
        "archs": list(backend.archs),
        "dtypes": [dtype_name(dtype) for dtype in backend.dtypes],
        "head_dims": str(backend.head_dims),
        "v_head_dims": str(backend.v_head_dims),
        "package": backend.package,
        "takes": [feature.code for feature in FEATURES if feature.code in backend.takes],
        "refuses": [feature.code for feature in FEATURES if feature.code not in backend.takes],
        "limits": {limit.code: limit.summary for limit in backend.limits},
    }


def features_header() -> tuple[str, ...]:
    """Columns of the feature matrix."""
    return ("feature", *(backend.name for backend in BACKENDS))


def features_rows() -> list[tuple[str, ...]]:
    """One line per feature: its code, then "yes" or "-" for each backend."""
    return [
        (feature.code, *("yes" if feature.code in backend.takes else "-" for backend in BACKENDS))
        for feature in FEATURES
    ]


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns, two spaces between them."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """The same as a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown() -> str:
    """The whole of docs/backends.md."""
    limits = [(b.name, limit.code, limit.summary) for b in BACKENDS for limit in b.limits]
    return "\n".join(
        [
            "# Attention backends",
            "",
            "<!-- Generated: rocm-attn backends --markdown > docs/backends.md. A test fails if it is not current. -->",
            "",
            INTRODUCTION,
            "",
            "## Declarations",
            "",
            markdown_table(HEADER, [backend_row(backend) for backend in BACKENDS]),
            "",
            *(f"- `{backend.name}`: {backend.summary}." for backend in BACKENDS),
            "",
            "On CPU tensors the op always runs ATen, whatever was chosen. Unless an architecture is named",
            '(`options={"arch": ...}`), TRITON_ATTN and TRITON_MLA then take fp64 and any sizes as well.',
            "",
            "## Features",
            "",
            "A backend refuses a site with a feature that it does not take; the feature's code is the reason.",
            "",
            markdown_table(features_header(), features_rows()),
            "",
            *(f"- `{feature.code}`: {feature.summary}." for feature in FEATURES),
            "",
            "## Limits across features",
            "",
            markdown_table(("backend", "code", "limit"), limits),
            "",
            "## Other reason codes",
            "",
            *(f"- `{code}`: {meaning}." for code, meaning in BASE_CODES.items()),
            "",
            RULES,
            "",
        ]
    )


INTRODUCTION = """\
A backend is a declaration of what it can compute. For every attention the backend is chosen by the documented rules
(below); if it cannot take the attention, the next one that can does, with a warning and all reasons in the report."""

RULES = """\
## How one is chosen

The rules are those of vLLM 0.12 and 0.13 for ROCm. The environment is read at compile time.
A flag is true if its text, in lower case, is `true` or `1`; anything else is false. [env.md](env.md) lists them.

1. `VLLM_ATTENTION_BACKEND` or `options={"attention_backend": ...}` names one. Names are case-sensitive. Where both are
   set and differ, the environment wins, with a warning. The other flags are then ignored.
2. Else `ROCM_AITER_UNIFIED_ATTN`, if `VLLM_ROCM_USE_AITER` and `VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION` are true.
3. Else `ROCM_AITER_FA`, if `VLLM_ROCM_USE_AITER` and `VLLM_ROCM_USE_AITER_MHA` (true by default) are true and the
   architecture is gfx90a, gfx942 or gfx950.
4. Else `ROCM_ATTN`, if `VLLM_V1_USE_PREFILL_DECODE_ATTENTION` is true.
5. Else `TRITON_ATTN`.

For latent attention (MLA): the one named; else `ROCM_AITER_MLA`, if `VLLM_ROCM_USE_AITER` and
`VLLM_ROCM_USE_AITER_MLA` (true by default) are true, the architecture is gfx90a, gfx942 or gfx950 and AITER is
installed, or if `options={"block_size": 1}`; else `TRITON_MLA`.

If the chosen one cannot take an attention: the other backends that the flags enable, in the order above, then
`TRITON_ATTN`, then `FLEX_ATTENTION`. With `options={"strict": True}` that is an error instead.

Errors at compile time:

- `ValueError`: the name is unknown (an empty one is), or not that of an MLA backend for an MLA attention;
  `ROCM_AITER_FA` is named and the architecture is none of the three above; `TRITON_MLA` is named with block size 1.
- `RuntimeError`: the name is valid, but not for an attention that is not MLA.
- `BackendUnavailableError`, a `ValueError`: the backend was named, and its hardware or its package is not there.
- `StrictError`, a `NotImplementedError`: `strict`, and some attention is not computed as chosen."""
