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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.fx as fx

from . import _torch_private
from .backends import by_name
from .backends.select import Choice, Rejected, StrictError, select
from .capture import capture, expand
from .capture.trace import Trace, Value
from .env import Environment
from .lower import lower
from .options import Options, follow_mode, guard_environment, split_options
from .reasons import INTERNAL_ERROR, Reason, Refusal
from .recognize import Sites, counts, recognize
from .recognize.kv_cache import forget_cache
from .recognize.latent import forget_latent
from .recognize.region import LookAlike, Region
from .report import Report, Site, publish, source_of, withdraw
from .rewrite import Rewriter, Tuner, verify
from .spec import AttentionSpec

log = logging.getLogger(__name__)

_ROUNDS = 3
"""One proof may need head counts as numbers first and head sizes then."""

LATENTS_GONE = frozenset({"value_unavailable", "size_unavailable"})
"""With these the keys may still be there where what they were expanded from has been overwritten."""


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    lowering: str = "inductor",
) -> Callable:
    """Compile one Dynamo graph; see `compiler.rocm_attn`. `lowering` is "inductor", "aot_eager" or "eager"."""
    guard_environment()
    ours, inductor_options = split_options(options)
    ours = follow_mode(ours, mode)
    env = Environment.current(ours)
    report = Report.of(_torch_private.compile_id(), env, ours)
    before = graph_module.print_readable(print_output=False) if ours.dump_dir else ""
    try:
        if not ours.disable:
            replace_attention(graph_module, example_inputs, ours, env, report)
        _check_strict(report, ours)
    finally:
        publish(report)
    log.debug("%s", _torch_private.log_graph("ROCm_Attention_Rewritten_Graph", graph_module))
    if ours.dump_dir:
        _dump(Path(ours.dump_dir), report, before, graph_module)
    try:
        return lower(graph_module, example_inputs, lowering=lowering, mode=mode, inductor_options=inductor_options)
    except Exception as error:
        if _torch_private.is_restart(error):  # Dynamo traces the function again: this graph will never run
            withdraw(report)
        raise


def replace_attention(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options, env: Environment, report: Report
) -> None:
    """The stages from `capture` to `rewrite`, on a graph module and those nested in it."""
    found: list[_Found] = []
    backup = _graphs(graph_module)
    with _undone_on_error(backup, options, env, report):
        with _timed(report, "capture"):
            report.notes += [f"{node.name} stays whole: {why}" for node, why in expand(graph_module).refused]
            trace = capture(graph_module, example_inputs, _torch_private.current_shape_env())
            report.notes += _not_looked_into(trace)
        with _timed(report, "recognize"):
            found = _recognize_all(list(_with_nested(trace)))
            report.recognized = counts(item for f in found for item in f.items)
    # Outside: a choice that breaks the documented rules is the user's to repair.
    choices = {region: _choose(region, env, options) for f in found for region in f.regions}
    tune = Tuner() if options.autotune else None
    with _undone_on_error(backup, options, env, report), _timed(report, "rewrite"):
        for f in found:
            inputs = example_inputs if f is found[0] else ()  # what comes into a nested graph is not known
            rewriter = Rewriter(f.trace, _verification(f.trace, inputs) if options.verify else None, tune)
            for item in sorted(f.items, key=lambda item: item.anchor.id):
                if isinstance(item, LookAlike):
                    _report_refused(report, env, item)
                else:
                    report.sites.append(_replace_site(rewriter, item, choices[item], options, env, report))
            report.notes += rewriter.finish()


class _Found(NamedTuple):
    """What `recognize` gave for one graph module."""

    trace: Trace
    regions: list[Region]
    others: list[LookAlike]

    @property
    def items(self) -> list[Region | LookAlike]:
        return [*self.regions, *self.others]


def _with_nested(trace: Trace) -> Iterator[Trace]:
    yield trace
    for nested in trace.subtraces.values():
        yield from _with_nested(nested)


def _not_looked_into(trace: Trace) -> Iterator[str]:
    """Regions whose attentions, if any, nobody will see."""
    for inner in _with_nested(trace):
        entered = {node for node, _ in inner.subgraphs}
        for node, code, text in inner.not_executed:
            if code == "higher_order_op" and node not in entered:
                yield f"{node.name} is not looked into: {text}"


def _recognize_all(traces: list[Trace]) -> list[_Found]:
    for _ in range(_ROUNDS):
        found = _recognize_each(traces)
        if not _fix_head_dims([r for f in found for r in f.regions], [o for f in found for o in f.others]):
            return found
    return _recognize_each(traces)


def _recognize_each(traces: list[Trace]) -> list[_Found]:
    sites = Sites()
    return [_Found(trace, *recognize(trace, sites)) for trace in traces]


def _choose(region: Region, env: Environment, options: Options) -> Choice | Rejected:
    """The choice for a site. A cache that the backend cannot read is gathered, and is no reason against a backend."""
    choice = select(replace(region.spec, cache=None), env, options)
    if region.cache is not None and isinstance(choice, Choice):
        reasons = by_name(choice.backend).reasons(region.spec, env)
        if reasons:
            forget_cache(region, f"{choice.backend} {'; '.join(reason.text for reason in reasons)}")
    return choice


def _replace_site(
    rewriter: Rewriter,
    region: Region,
    choice: Choice | Rejected,
    options: Options,
    env: Environment,
    report: Report,
) -> Site:
    """Rewrite one site as chosen; the returned entry says what happened."""
    possible = (region.latent_note, region.bias_note, region.cache_note)
    notes = [note for note in possible if note is not None]
    site = Site.recognized(region.spec, choice, notes=notes, **_place(region.anchor))
    if not isinstance(choice, Choice):
        return site
    if options.fuel is not None and sum(s.replaced for s in report.sites) >= options.fuel:
        return _not_replaced(site, Reason("no_fuel", f"options fuel={options.fuel} is used up"))
    try:
        rewriter.apply(region, choice.impl)
    except Refusal as refusal:
        gone = refusal.reason.code in LATENTS_GONE
        if gone and (forget_latent(region, refusal.reason) or forget_cache(region, str(refusal.reason))):
            return _replace_site(rewriter, region, _choose(region, env, options), options, env, report)
        return _not_replaced(site, refusal.reason)
    except Exception as error:  # a defect of ours must not stop the user's program; the graph is as it was
        _warn_internal(env, f"while rewriting {site.source}, left as it is", error)
        return _not_replaced(site, Reason(INTERNAL_ERROR, repr(error)))
    if (tuned := rewriter.tuned.get(region)) is not None:
        site.impl = tuned.impl
        site.choice += tuned.sentences
    return site


def _verification(trace: Trace, example_inputs: Sequence[Any]) -> Callable[..., None]:
    """`options={"verify": True}`: what the rewriter asks before it uses what it emitted."""
    placeholders = [node for node in trace.graph_module.graph.nodes if node.op == "placeholder"]
    return partial(verify, inputs=dict(zip(placeholders, example_inputs)))


def _graphs(graph_module: fx.GraphModule) -> dict[fx.GraphModule, fx.Graph]:
    """A copy of the graph and of those nested in it."""
    modules = [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
    return {module: _torch_private.copy_graph(module.graph) for module in modules}


@contextmanager
def _undone_on_error(
    backup: Mapping[fx.GraphModule, fx.Graph], options: Options, env: Environment, report: Report
) -> Iterator[None]:
    """A defect of ours inside leaves the graph as it was, with a warning; `strict` raises it."""
    try:
        yield
    except Exception as error:
        if options.strict:
            raise
        for module, graph in backup.items():
            module.graph = graph
        _warn_internal(env, f"in graph {report.graph}, left as it is", error)
        reason = Reason(INTERNAL_ERROR, repr(error))
        report.notes.append(f"the graph is left as it is: {reason}")
        report.sites[:] = [_not_replaced(site, reason) if site.replaced else site for site in report.sites]


def _warn_internal(env: Environment, where: str, error: Exception) -> None:
    env.warn(f"internal error {where}: {error!r}; please report it")
    log.warning("%s", "".join(traceback.format_exception(error)))


def _fix_head_dims(regions: Sequence[Region], others: Sequence[LookAlike]) -> bool:
    """Make head sizes (and head counts that a proof needs) numbers; True if any was a symbol.

    With `dynamic=True` they are symbols, but kernels are chosen by them. Dynamo gets a guard and the sizes of all
    captured values change, so the caller recognises again.
    """
    shape_env = _torch_private.current_shape_env()
    sizes = [size for region in regions for size in _kernel_sizes(region.spec)]
    sizes += [size for other in others for size in other.needs_numbers]
    symbolic = {size for size in sizes if not isinstance(size, int) and size.free_symbols}
    if shape_env is None or not symbolic:
        return False
    symbols = sorted(set().union(*(size.free_symbols for size in symbolic)), key=str)
    numbers = [_torch_private.specialize(symbol, shape_env) for symbol in symbols]
    return any(number is not None for number in numbers)


def _kernel_sizes(spec: AttentionSpec) -> list[Any]:
    """What kernels are chosen by: head sizes, the latent's, and the block size of a cache."""
    sizes = [spec.head_dim, spec.v_head_dim]
    if spec.latent is not None:
        sizes += [spec.latent.kv_lora_rank, spec.latent.qk_rope_head_dim]
    if spec.cache is not None and spec.cache.block_size is not None:
        sizes.append(spec.cache.block_size)
    return sizes


def _not_replaced(site: Site, reason: Reason) -> Site:
    site.replaced, site.backend, site.impl = False, None, ""
    site.reasons.insert(0, reason)
    return site


def _report_refused(report: Report, env: Environment, other: LookAlike) -> None:
    site = Site.refused(other.reason, **_place(other.anchor))
    if other.reason.code == INTERNAL_ERROR:
        env.warn(f"internal error while proving {site.source}, left as it is: {other.reason.text}; please report")
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
