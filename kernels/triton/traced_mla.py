"""TRITON_MLA in a compiler's trace: see traced.py.

Hopper's own kernels for latent decode are in Gluon, which Inductor cannot launch. A call stays opaque for them where
they save more than that costs the host: where it is long, and where CUDA graphs replay it, at no cost to the host.
"""

from __future__ import annotations

from typing import Any

from . import backward_hopper_launch, forward_hopper_launch, mla_configs
from .forward_hopper_launch import Blocks
from .launch import MIN_TMA_SCORES, Tuning, device_arch
from .mla_decode_launch import mla_decode_launches
from .mla_prefill import check, gradients, in_pieces, prefill_backward_launches, prefill_launches
from .sizes import Hint, likely
from .traced import StaysOpaque, Tracer, hint_of, leave_to_hopper, trace, written_out


@written_out
def mla_decode(tracer: Tracer, **arguments: Any) -> Any:
    """As mla.mla_decode, all arguments by name, on traced tensors; or NotImplemented."""
    q, kv, table = arguments["q_latent"], arguments["kv_c"], arguments["block_table"]
    widths = [x.shape[-1] for x in (q, kv, arguments["q_pe"], arguments["k_pe"]) if x is not None]
    hint = hint_of(arguments, tracer, (q.shape[1], *widths, 0 if table is None else kv.shape[1]))
    kv_len = kv.shape[1] * (1 if table is None else table.shape[1])
    scores = hint(q.shape[0]) * q.shape[1] * hint(q.shape[2]) * likely(kv_len, hint)
    if device_arch(q.device)[0] == "sm90" and (scores >= mla_configs.MIN_OWN_SCORES or tracer.uses_cuda_graphs()):
        raise StaysOpaque(f"a kernel in Gluon is faster: {scores} scores, or CUDA graphs")
    tuning = Tuning(traced=True, tma=False if scores < MIN_TMA_SCORES else None, hint=hint)
    launches, out, lse = mla_decode_launches(**arguments, tuning=tuning)
    trace(launches, arguments, tracer)
    return out, lse


@written_out
def mla_prefill(tracer: Tracer, **arguments: Any) -> Any:
    """As mla.mla_prefill, where its kernels take both pieces as they are; or NotImplemented."""
    given = dict(arguments)
    masks = tuple(given.pop(name) for name in ("key_mask", "kv_start", "kv_end"))
    hint = _hint(given, arguments, tracer, forward_hopper_launch.FASTER)
    launches, out, lse = prefill_launches(**given, masks=masks, tuning=Tuning(traced=True, hint=hint))
    trace(launches, arguments, tracer)
    return out, lse


@written_out
def mla_prefill_backward(tracer: Tracer, **arguments: Any) -> Any:
    """As mla.mla_prefill_backward, an unwanted gradient an empty tensor, as of the op; or NotImplemented."""
    given = dict(arguments)
    masks = tuple(given.pop(name) for name in ("key_mask", "kv_start", "kv_end"))
    hint = _hint(given, arguments, tracer, backward_hopper_launch.FASTER)
    launches, tensors = prefill_backward_launches(**given, masks=masks, tuning=Tuning(traced=True, hint=hint))
    trace(launches, arguments, tracer)
    found = gradients(tensors, given["k_pe"], given["output_mask"])
    return tuple(given["grad_out"].new_empty((0,)) if gradient is None else gradient for gradient in found)


def _hint(given: dict[str, Any], arguments: dict[str, Any], tracer: Tracer, faster: dict[Blocks, int]) -> Hint:
    """As traced.hint_of; raises also where kernels do not take both pieces, or Hopper's own may take the call."""
    q, q_pe, k, k_pe, v = (given[name] for name in ("q_nope", "q_pe", "k_nope", "k_pe", "v"))
    if q_pe is None or k_pe is None:
        raise StaysOpaque("there is no rotary half: it runs as plain attention")
    hint = hint_of(arguments, tracer, (q.shape[1], k.shape[1], *(x.shape[-1] for x in (q, q_pe, v))))
    leave_to_hopper(hint, faster, q, k, v, k_pe.shape[2])
    check(q, q_pe, k, k_pe)
    if not in_pieces(q, k_pe, v):
        raise StaysOpaque(f"heads of {q.shape[3]} and {k_pe.shape[2]} are put together first")
    return hint
