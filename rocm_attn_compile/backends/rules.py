"""The documented selection rules, exactly: which backend the flags ask for, before anyone looks at the site.

These are the rules of vLLM 0.12 and 0.13 for ROCm (its AMD backend guide describes them), stated in our own words.
They read flags, architecture and page size only; whether the chosen backend can take a site is `select.py`'s question.
"""

from __future__ import annotations

import difflib

from ..env import GFX9, Flags

DEFAULT_BLOCK_SIZE = 16

GENERAL = ("TRITON_ATTN", "ROCM_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "FLEX_ATTENTION")
MLA = ("TRITON_MLA", "ROCM_AITER_MLA", "ROCM_AITER_TRITON_MLA")
NAMES = GENERAL + MLA

OTHER_PLATFORMS = (
    "CPU_ATTN",
    "CUSTOM",
    "CUTLASS_MLA",
    "FLASHINFER",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASHMLA_SPARSE",
    "FLASH_ATTN",
    "FLASH_ATTN_MLA",
    "IPEX",
    "NO_ATTENTION",
    "PALLAS",
    "ROCM_AITER_MLA_SPARSE",
    "TORCH_SDPA",
    "TREE_ATTN",
    "XFORMERS",
)
"""Names that vLLM knows for other hardware or purposes: valid words, but never a choice here."""

VARIABLE = "VLLM_ATTENTION_BACKEND"


def documented_choice(
    flags: Flags,
    arch: str | None,
    kind: str,
    block_size: int | None,
    aiter_present: bool,
    source: str = VARIABLE,
) -> tuple[str, str]:
    """The backend the rules name, and the sentence that says why.

    Args:
        flags: The environment's flags; `attention_backend` holds the explicit choice, if any.
        arch: Target architecture; None (no GPU) is not gfx9.
        kind: "attention" or "mla".
        block_size: Page size of the KV cache; None is 16. Only MLA's rules read it.
        aiter_present: AMD's AITER is installed. Only MLA's rules read it.
        source: Where the explicit choice comes from, for messages.

    Raises:
        ValueError: The explicit name is unknown (names are case-sensitive, "" is a name too), not an MLA backend for an
            MLA site, ROCM_AITER_FA off gfx9, or TRITON_MLA with block size 1.
        RuntimeError: The explicit name is a valid one, but not for a general attention on ROCm.
    """
    assert kind in ("attention", "mla"), kind
    name = flags.attention_backend
    if name is not None and name not in NAMES + OTHER_PLATFORMS:
        near = difflib.get_close_matches(name.upper(), NAMES, n=1)
        hint = f" Did you mean {near[0]!r}? Names are case-sensitive." if near else ""
        raise ValueError(f"Invalid value {name!r} for {source}. Valid options: {list(NAMES)}.{hint}")
    block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
    if kind == "mla":
        return _mla(flags, arch, block_size, aiter_present, source)
    return _general(flags, arch, source)


def _unified_enabled(flags: Flags) -> bool:
    return flags.use_aiter and flags.use_aiter_unified


def _aiter_fa_enabled(flags: Flags, arch: str | None) -> bool:
    return flags.use_aiter and flags.use_aiter_mha and arch in GFX9


def _aiter_mla_obstacles(flags: Flags, arch: str | None, aiter_present: bool) -> list[str]:
    conditions = (
        (flags.use_aiter, "VLLM_ROCM_USE_AITER is false"),
        (flags.use_aiter_mla, "VLLM_ROCM_USE_AITER_MLA is false"),
        (arch in GFX9, f"{arch or 'no GPU'} is not gfx9"),
        (aiter_present, "AITER is not installed"),
    )
    return [text for ok, text in conditions if not ok]


def _general(flags: Flags, arch: str | None, source: str) -> tuple[str, str]:
    name = flags.attention_backend
    target = arch or "unknown (no GPU)"
    if name is not None:
        if name not in GENERAL:
            raise RuntimeError(
                f"Attention backend {name} is not supported on ROCm for this attention, which is not MLA; "
                f"set {source} to one of {', '.join(GENERAL)}"
            )
        if name == "ROCM_AITER_FA" and arch not in GFX9:
            raise ValueError(
                f"The selected backend, ROCM_AITER_FA, is only supported on gfx9 architectures ({', '.join(GFX9)}); "
                f'the target is {target}. Set options={{"arch": ...}} to compile for another GPU, or choose another'
            )
        return name, f"{name}: named by {source}"
    if _unified_enabled(flags):
        return (
            "ROCM_AITER_UNIFIED_ATTN",
            "ROCM_AITER_UNIFIED_ATTN: VLLM_ROCM_USE_AITER and VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION are true",
        )
    if _aiter_fa_enabled(flags, arch):
        return (
            "ROCM_AITER_FA",
            f"ROCM_AITER_FA: VLLM_ROCM_USE_AITER and VLLM_ROCM_USE_AITER_MHA are true and {arch} is gfx9",
        )
    # From here on AITER is out; say so if the user switched it on.
    why_not_aiter = ""
    if flags.use_aiter:
        cause = f"{target} is not gfx9" if flags.use_aiter_mha else "VLLM_ROCM_USE_AITER_MHA is false"
        why_not_aiter = f"; VLLM_ROCM_USE_AITER is true, but {cause}"
    if flags.prefill_decode:
        return "ROCM_ATTN", f"ROCM_ATTN: VLLM_V1_USE_PREFILL_DECODE_ATTENTION is true{why_not_aiter}"
    return "TRITON_ATTN", f"TRITON_ATTN: the default, no flag asks for another{why_not_aiter}"


def _mla(flags: Flags, arch: str | None, block_size: int, aiter_present: bool, source: str) -> tuple[str, str]:
    name = flags.attention_backend
    if name is not None:
        if name not in MLA:
            raise ValueError(
                f"The selected backend, {name}, is not MLA type while requested for MLA backend; "
                f"set {source} to one of {', '.join(MLA)}"
            )
        if name == "TRITON_MLA" and block_size == 1:
            raise ValueError(
                "The selected backend, TRITON_MLA, does not support block size 1; "
                "choose ROCM_AITER_MLA or a block_size of 16"
            )
        return name, f"{name}: named by {source}"
    if block_size == 1:
        return "ROCM_AITER_MLA", "ROCM_AITER_MLA: block_size is 1, which only it supports"
    obstacles = _aiter_mla_obstacles(flags, arch, aiter_present)
    if not obstacles:
        return (
            "ROCM_AITER_MLA",
            f"ROCM_AITER_MLA: VLLM_ROCM_USE_AITER and VLLM_ROCM_USE_AITER_MLA are true, {arch} is gfx9, AITER is there",
        )
    return "TRITON_MLA", f"TRITON_MLA: the default for MLA; not ROCM_AITER_MLA: {', '.join(obstacles)}"


def enabled_order(
    flags: Flags, arch: str | None, kind: str, block_size: int | None, aiter_present: bool
) -> tuple[str, ...]:
    """Backends to try for a site, best first, when nothing is named: those the flags enable, then the general ones.

    The first is `documented_choice`'s.
    """
    order = []
    if kind == "mla":
        if block_size == 1 or not _aiter_mla_obstacles(flags, arch, aiter_present):
            order.append("ROCM_AITER_MLA")
        order.append("TRITON_MLA")
    else:
        if _unified_enabled(flags):
            order.append("ROCM_AITER_UNIFIED_ATTN")
        if _aiter_fa_enabled(flags, arch):
            order.append("ROCM_AITER_FA")
        if flags.prefill_decode:
            order.append("ROCM_ATTN")
    return (*order, "TRITON_ATTN", "FLEX_ATTENTION")
