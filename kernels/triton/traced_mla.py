"""TRITON_MLA in a compiler's trace: see traced.py.

Hopper's own kernels for latent decode are in Gluon, which Inductor cannot launch. A call stays opaque for them where
they save more than that costs the host: where it is long, and where CUDA graphs replay it, at no cost to the host.
"""

from __future__ import annotations

from typing import Any

from . import mla_configs
from .launch import MIN_TMA_SCORES, Tuning, device_arch
from .mla_decode_launch import mla_decode_launches
from .mla_prefill import check, gradients, in_pieces, prefill_backward_launches, prefill_launches
from .traced import Tracer, trace

_TUNING = Tuning(traced=True)
_SHORT = Tuning(traced=True, tma=False)


def mla_decode(tracer: Tracer, **arguments: Any) -> Any:
    """As mla.mla_decode, all arguments by name, on traced tensors of fixed sizes; or NotImplemented."""
    q, kv, table = arguments["q_latent"], arguments["kv_c"], arguments["block_table"]
    kv_len = kv.shape[1] * (1 if table is None else table.shape[1])
    scores = q.shape[0] * q.shape[1] * q.shape[2] * kv_len
    if device_arch(q.device)[0] == "sm90" and (scores >= mla_configs.MIN_OWN_SCORES or tracer.uses_cuda_graphs()):
        return NotImplemented
    tuning = _SHORT if scores < MIN_TMA_SCORES else _TUNING
    launches, out, lse = mla_decode_launches(**arguments, tuning=tuning)
    return (out, lse) if trace(launches, arguments, tracer) else NotImplemented


def mla_prefill(tracer: Tracer, **arguments: Any) -> Any:
    """As mla.mla_prefill, where its kernels take both pieces as they are; or NotImplemented."""
    given = dict(arguments)
    masks = tuple(given.pop(name) for name in ("key_mask", "kv_start", "kv_end"))
    if not _in_pieces(given):
        return NotImplemented
    launches, out, lse = prefill_launches(**given, masks=masks, tuning=_TUNING)
    return (out, lse) if trace(launches, arguments, tracer) else NotImplemented


def mla_prefill_backward(tracer: Tracer, **arguments: Any) -> Any:
    """As mla.mla_prefill_backward, an unwanted gradient an empty tensor, as of the op; or NotImplemented."""
    given = dict(arguments)
    masks = tuple(given.pop(name) for name in ("key_mask", "kv_start", "kv_end"))
    if not _in_pieces(given):
        return NotImplemented
    launches, tensors = prefill_backward_launches(**given, masks=masks, tuning=_TUNING)
    if not trace(launches, arguments, tracer):
        return NotImplemented
    found = gradients(tensors, given["k_pe"], given["output_mask"])
    return tuple(given["grad_out"].new_empty((0,)) if gradient is None else gradient for gradient in found)


def _in_pieces(given: dict[str, Any]) -> bool:
    if given["q_pe"] is None or given["k_pe"] is None:
        return False
    check(given["q_nope"], given["q_pe"], given["k_nope"], given["k_pe"])
    return in_pieces(given["q_nope"], given["k_pe"], given["v"])
