"""Run one case every way and compare: eager, float64, ours, Inductor's passes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rocm_attn_compile.testing import Float64Everywhere, RoundedAgain, accuracy, to_float64

from .ours import Ours
from .peer import Peer
from .watch import SiteWatch

FACTOR = 4.0
"""How many times eager's own error is allowed: a whole model adds up many roundings in other orders."""


_DRAWS = 4
"""How often eager is rounded once more at random, for a result that is not as exact as it."""


class Case:
    """A model in eval mode, its arguments, and how to run it."""

    def __init__(self, model: torch.nn.Module, arguments: dict[str, Any], gradients: bool) -> None:
        self.model, self.arguments, self.gradients = model, arguments, gradients

    def run(self, call: Callable, model: torch.nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
        """Float results of one call, then (with `gradients`) the gradients of all parameters."""
        torch.manual_seed(7)
        if not self.gradients:
            with torch.no_grad():
                return _floats(call(**arguments))
        results = [t for t in _floats(call(**arguments)) if t.requires_grad]
        loss = sum((t.double() * _weights(t)).sum() for t in results)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        # AOTAutograd gives zeros where eager gives None: for parameters of a result that nobody reads
        return [t.detach() for t in results] + [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)
        ]


def judge(case: Case, *, with_peer: bool = True, lowering: str = "eager") -> dict[str, Any]:
    """Everything about the case as plain data; a part that fails is said with its error."""
    found: dict[str, Any] = {"seconds": {}}
    model, arguments = case.model, case.arguments

    def timed(name: str, function: Callable) -> Any:
        start = time.perf_counter()
        try:
            return function()
        except Exception as error:
            found[f"{name}_error"] = _what(error)
            return None
        finally:
            found["seconds"][name] = round(time.perf_counter() - start, 2)

    watch = SiteWatch(model)

    def watched() -> None:
        torch.manual_seed(7)
        with torch.no_grad(), watch.watching():
            model(**arguments)

    timed("watch", watched)
    found |= {"softmax": dict(watch.softmax), "sdpa": dict(watch.sdpa), "other": dict(watch.other)}
    eager = timed("eager", lambda: case.run(model, model, arguments))
    if eager is None or "watch_error" in found:
        return found

    ours = Ours("aot_eager" if case.gradients and lowering == "eager" else lowering)
    got = timed("ours", lambda: _compiled(case, ours))
    found |= {
        "graphs": ours.graphs,
        "replaced": dict(ours.replaced),
        "refused": [[*site, count] for site, count in ours.refused.items()],
        "notes": sorted(ours.notes)[:5],
    }
    exact = timed("exact", lambda: _exact(case))
    if got is not None:
        found["accuracy"] = compare(got, eager, exact)
    if with_peer:
        peer = Peer()
        theirs = timed("peer", lambda: _compiled(case, peer))
        found |= {"peer_graphs": peer.graphs, "peer_fused": peer.fused}
        if ours.graphs > peer.graphs and ours.lowering == "eager":
            # A graph that AOTAutograd cannot trace Dynamo does not count, but runs its function without it.
            traced = Ours("aot_eager")
            timed("traced", lambda: _compiled(case, traced))
            found["graphs"] = traced.graphs
        if theirs is not None:
            found["peer_accuracy"] = compare(theirs, eager, exact)
    if got is not None and not found["accuracy"]["ok"]:
        rounded = timed("rounded", lambda: _rounded(case))
        found["accuracy"] = compare(got, eager, exact, rounded)
    if got is None or not found["accuracy"]["ok"]:  # is it us, or what comes before us?
        control = timed("control", lambda: _compiled(case, Ours(ours.lowering, {"disable": True})))
        if control is not None:
            found["control_accuracy"] = compare(control, eager, exact)
    return found


def compare(
    got: list[Tensor], eager: list[Tensor], exact: list[Tensor] | None, rounded: list[list[Tensor]] | None = None
) -> dict[str, Any]:
    """`ok`, the worst ratio of our error to eager's, and what went wrong if something did.

    A gradient of two numbers, or one that is 0 but for rounding, can be far more exact in eager than its conditioning
    lets one expect, by chance. With `rounded`, eager's results with one more rounding of its parameters, or of all that
    it computes, what each of those changes is allowed too.
    """
    if len(got) != len(eager):
        return {"ok": False, "text": f"{len(got)} results, eager gives {len(eager)}"}
    usable = exact is not None and [t.shape for t in exact] == [t.shape for t in eager]
    worst, bad = 0.0, []
    for i, (a, b) in enumerate(zip(got, eager)):
        reference = exact[i] if usable and exact is not None else b.double()
        try:
            measured = accuracy(a, b, reference, factor=FACTOR)
        except AssertionError as error:
            bad.append(f"{i}: {str(error)[:200]}")
            continue
        ratio = measured.rms_error / max(measured.eager_rms_error, measured.rounding, 1e-30)
        worst = max(worst, ratio)
        # without a float64 result eager is the reference, and two orders of summation differ by a few roundings
        allowed = measured.ok if usable else measured.rms_error <= 100 * measured.rounding
        for changed in rounded or [] if not allowed else []:
            change = (changed[i].double() - b.double()).abs()
            allowed |= measured.max_error <= FACTOR * float(change.max()) and measured.rms_error <= FACTOR * float(
                change.square().mean().sqrt()
            )
        if not allowed:
            bad.append(f"{i} {tuple(a.shape)}: {measured}")
    return {"ok": not bad, "worst": round(worst, 2), "exact": usable, "text": "; ".join(bad[:3])}


def _compiled(case: Case, backend: Callable) -> list[Tensor]:
    torch._dynamo.reset()
    return case.run(torch.compile(case.model, backend=backend), case.model, case.arguments)


def _with_rounded_parameters(case: Case) -> list[Tensor]:
    """Eager, every parameter changed by at most one unit in its last place."""
    saved = [p.detach().clone() for p in case.model.parameters()]
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * (2 * torch.rand_like(parameter) - 1))
    try:
        return case.run(case.model, case.model, case.arguments)
    finally:
        with torch.no_grad():
            for parameter, value in zip(case.model.parameters(), saved):
                parameter.copy_(value)


def _with_rounded_results(case: Case, seed: int = 0) -> list[Tensor]:
    """Eager, everything that it computes rounded once more."""
    with RoundedAgain(seed):
        return case.run(case.model, case.model, case.arguments)


def _rounded(case: Case) -> list[list[Tensor]]:
    """Eager rounded once more in several ways: of a result of few numbers a single one is a matter of luck itself."""
    return [_with_rounded_parameters(case), *(_with_rounded_results(case, seed) for seed in range(_DRAWS))]


def _exact(case: Case) -> list[Tensor]:
    model = to_float64(case.model)
    if hasattr(model, "config"):
        model.config._experts_implementation = "eager"  # the grouped matrix product has no float64 form
    arguments = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, case.arguments)
    with Float64Everywhere():
        return [t.double() for t in case.run(model, model, arguments)]


def _floats(results: Any) -> list[Tensor]:
    if hasattr(results, "to_tuple"):
        results = results.to_tuple()
    return [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]


def _weights(tensor: Tensor) -> Tensor:
    """Fixed weights of a loss that every entry takes part in differently."""
    return torch.linspace(0.5, 1.5, tensor.numel(), dtype=torch.float64).view(tensor.shape).cos()


def _what(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:400]} ({last.filename.rsplit('/', 2)[-1]}:{last.lineno})"
