"""The map: every stage of a compilation, in order.

capture      run Dynamo's graph on fake tensors, record a functional ATen program
normalize    every spelling of softmax becomes one form
recognize    prove which parts are attention; labels, masks, specs
select       choose a backend for each by the documented rules
rewrite      put one op in the place of each, in Dynamo's own graph
lower        give the graph to Inductor
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.fx as fx

from . import _torch_private
from .backends.select import Choice, StrictError, select
from .capture import capture, expand
from .capture.trace import Trace, Value
from .env import Environment
from .lower import lower
from .options import Options, split_options
from .reasons import Reason, Refusal
from .recognize import recognize
from .recognize.region import LookAlike, Region
from .report import Report, Site, publish, source_of
from .rewrite import Rewriter

log = logging.getLogger(__name__)

_ROUNDS = 3
"""One proof may need head counts as numbers first and head sizes then."""


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    lowering: str = "inductor",
) -> Callable:
    """Compile one Dynamo graph; see `compiler.rocm_attn`. `lowering` is "inductor", "aot_eager" or "eager"."""
    ours, inductor_options = split_options(options)
    env = Environment.current(ours)
    report = Report.of(_torch_private.compile_id(), env, ours)
    before = graph_module.print_readable(print_output=False) if ours.dump_dir else ""
    try:
        if not ours.disable:
            with _timed(report, "capture"):
                report.notes += [f"{node.name} stays whole: {why}" for node, why in expand(graph_module).refused]
                trace = capture(graph_module, example_inputs, _torch_private.current_shape_env())
            replace_attention(trace, ours, env, report)
        _check_strict(report, ours)
    finally:
        publish(report)
    log.debug("%s", _torch_private.log_graph("ROCm_Attention_Rewritten_Graph", graph_module))
    if ours.dump_dir:
        _dump(Path(ours.dump_dir), report, before, graph_module)
    return lower(graph_module, example_inputs, lowering=lowering, mode=mode, inductor_options=inductor_options)


def replace_attention(trace: Trace, options: Options, env: Environment, report: Report) -> None:
    """The stages from `normalize` to `rewrite`, on one captured graph module and those nested in it."""
    with _timed(report, "recognize"):
        regions, others = recognize(trace)
        for _ in range(_ROUNDS):
            if not _fix_head_dims(regions, others):
                break
            regions, others = recognize(trace)
    for other in others:
        _report_refused(report, trace, other)
    rewriter = Rewriter(trace)
    with _timed(report, "rewrite"):
        for region in regions:
            report.sites.append(_replace_site(rewriter, region, options, env, report))
        rewriter.finish()
    for nested in trace.subtraces.values():
        replace_attention(nested, options, env, report)


def _replace_site(rewriter: Rewriter, region: Region, options: Options, env: Environment, report: Report) -> Site:
    """Select and rewrite one site; the returned entry says what happened."""
    choice = select(region.spec, env, options)
    site = Site.recognized(region.spec, choice, **_place(region.anchor))
    if not isinstance(choice, Choice):
        return site
    if options.fuel is not None and sum(s.replaced for s in report.sites) >= options.fuel:
        return _not_replaced(site, Reason("no_fuel", f"options fuel={options.fuel} is used up"))
    try:
        rewriter.apply(region, choice.impl)
    except Refusal as refusal:
        return _not_replaced(site, refusal.reason)
    except Exception as error:  # a defect of ours must not stop the user's program; the graph is as it was
        env.warn(f"internal error while rewriting {site.source}, left as it is: {error!r}; please report it")
        log.warning("%s", traceback.format_exc())
        return _not_replaced(site, Reason("internal_error", repr(error)))
    return site


def _fix_head_dims(regions: Sequence[Region], others: Sequence[LookAlike]) -> bool:
    """Make head sizes (and head counts that a proof needs) numbers; True if any was a symbol.

    With `dynamic=True` they are symbols, but kernels are chosen by them. Dynamo gets a guard and the sizes of all
    captured values change, so the caller recognises again.
    """
    shape_env = _torch_private.current_shape_env()
    sizes = [size for region in regions for size in (region.spec.head_dim, region.spec.v_head_dim)]
    sizes += [size for other in others for size in other.needs_numbers]
    symbolic = {size for size in sizes if not isinstance(size, int) and size.free_symbols}
    if shape_env is None or not symbolic:
        return False
    for symbol in sorted(set().union(*(size.free_symbols for size in symbolic)), key=str):
        _torch_private.specialize(symbol, shape_env)
    return True


def _not_replaced(site: Site, reason: Reason) -> Site:
    site.replaced, site.backend, site.impl = False, None, ""
    site.reasons.insert(0, reason)
    return site


def _report_refused(report: Report, trace: Trace, other: LookAlike) -> None:
    site = Site.refused(other.reason, **_place(other.anchor))
    (report.sites if other.is_attention else report.look_alikes).append(site)


def _place(value: Value) -> dict[str, str]:
    """Where a value comes from in the user's model, for `Site`."""
    meta = value.node.meta if value.node is not None else {}
    source, code = source_of(meta.get("stack_trace"))
    modules = list((meta.get("nn_module_stack") or {}).values())
    return {"source": source, "code": code, "module": str(modules[-1][0]) if modules else ""}


def _check_strict(report: Report, options: Options) -> None:
    problems = [(f"{s.source}  {s.spec}", s.reasons) for s in report.sites if s.reasons]
    if options.strict and problems:
        raise StrictError(problems)


def _dump(folder: Path, report: Report, before: str, graph_module: fx.GraphModule) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = "graph_" + report.graph.replace("/", "_")
    (folder / f"{stem}.before.py").write_text(before)
    (folder / f"{stem}.after.py").write_text(graph_module.print_readable(print_output=False))
    (folder / f"{stem}.report.json").write_text(report.to_json())
    (folder / f"{stem}.report.txt").write_text(str(report))


@contextmanager
def _timed(report: Report, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.timings[stage] = report.timings.get(stage, 0.0) + time.perf_counter() - start
