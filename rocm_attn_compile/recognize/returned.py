"""Weights that something else reads, too: a second result of the op, where no gradient is wanted.

    p = softmax(...)        p @ v, and p returned, averaged over the heads, handed over a graph break

Eager under Inductor writes scores, reads them, writes weights and reads those; the op reads none and writes the weights
alone. In training eager keeps the weights for its backward anyway, and they may have a gradient of their own.
"""

from __future__ import annotations

from ..capture.trace import Value
from ..reasons import Refusal
from .axes import atoms_of
from .live import LiveUsers
from .proof import Proof
from .region import Roles

_CODE = "weights_used_elsewhere"


def check_returned(
    proof: Proof, value: Value, roles: Roles, requires_grad: bool, has_row_sinks: bool, live: LiveUsers
) -> None:
    """Raises Refusal unless the op can give `value`, the weights that something else reads."""
    if requires_grad:
        raise Refusal(_CODE, f"{_who(value, live)}, and gradients are wanted, for which eager keeps the weights anyway")
    if has_row_sinks:
        raise Refusal(_CODE, f"{_who(value, live)}, and sinks that vary with the query are one more of them")
    axes = atoms_of([tuple(group) for group in (roles.batch, roles.heads, roles.query, roles.key)])
    if set(atoms_of(proof.labels.of(value))) != set(axes):
        raise Refusal(_CODE, f"{_who(value, live)}, along other axes than those of queries and keys")


def _who(value: Value, live: LiveUsers) -> str:
    try:
        users = live.users(value, _CODE)
    except Refusal as refusal:
        return refusal.reason.text
    return f"the attention weights have {len(users)} uses ({', '.join(sorted({user.name for user in users}))})"
