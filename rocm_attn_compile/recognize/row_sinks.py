"""Sinks that vary with the query: the op has one per head, and takes these as one more key.

    softmax([s, sink])[..., :-1] v  =  softmax(q [k, 0]^T + [bias, sink]) [v, 0]

The masks then stay what they are, float tensors: a closed form would drop that key, too. Inkling has such sinks, beside
a bias over all pairs.
"""

from __future__ import annotations

from ..reasons import Refusal
from ..spec import EmptyRows, MaskSpec
from . import mask as prover
from .biases import is_moderate_bias, refuse_casts, refuse_raised
from .compose import Logits
from .live import LiveUsers
from .masks import ProvedMasks
from .proof import Proof
from .region import Operand, Roles
from .symbols import Symbols


def take_row_sinks(logits: Logits) -> Operand:
    """The sinks, which are then no longer the op's; raises Refusal where they cannot be a key."""
    sinks = logits.sinks
    assert sinks is not None
    if logits.sinks_rescale:
        raise Refusal("sink_axis", "the sinks vary with the query, and rescale the output")
    logits.sinks = None
    return sinks


def masks_beside_row_sinks(proof: Proof, roles: Roles, logits: Logits, live: LiveUsers) -> ProvedMasks:
    """No mask in closed form, all biases as they are; raises Refusal where eager's meaning cannot be kept."""
    if logits.masks:
        raise Refusal("sink_axis", "the sinks vary with the query, beside a mask that replaces scores")
    if proof.zeroed:
        raise Refusal("sink_axis", "the sinks vary with the query, and weights are zeroed afterwards")
    symbols = Symbols(roles, live)
    refuse_raised(proof, logits, logits.biases, symbols, live)
    if not all(is_moderate_bias(bias, symbols, live) for bias in logits.biases):
        refuse_casts(proof, logits)
    closed = prover.classify(prover.make_evaluator(symbols.context), True, symbols.context)
    spec = MaskSpec(empty_rows=EmptyRows.NAN_ADDED, text=prover.mask_in_words(closed))
    return ProvedMasks(spec, closed, symbols.context, [], list(logits.biases))
