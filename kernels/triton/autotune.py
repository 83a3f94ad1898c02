"""Tunes the kernels of one attention call on the device: `mode="max-autotune"`.

Every candidate (candidates.py) of every kernel is compiled, in parallel, run on the call's own shapes and compared with
what the shipped configuration gives; the fastest right one is chosen, if it is faster by more than the noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from . import configs, tuned
from .backward_launch import backward_launches
from .candidates import Problem, candidates
from .configs import KernelConfig
from .device_timer import GpuDevice
from .forward_launch import forward_launches
from .launch import Launch, Tuning, base_of, device_arch
from .tuned_store import TunedStore, cache_folder

log = logging.getLogger(__name__)

NOISE = 0.02
"""A candidate replaces the shipped configuration if it is faster by more than this, twice."""


class Device(Protocol):
    """What tuning asks of the hardware; see device_timer.py."""

    def compile(self, launches: Sequence[Launch]) -> None:
        """Compile all, in parallel. What cannot be compiled raises when it is run."""

    def microseconds(self, launches: Sequence[Launch]) -> float:
        """Time of one of these launches, which are alike and run in turn."""


@dataclass(frozen=True)
class Outcome:
    """What tuning found for one kernel of a call.

    Attributes:
        direction: "forward", "decode", "backward_kv", ...
        config, tma: The choice.
        us, shipped_us: Microseconds of the choice and of the shipped configuration.
        tried: Number of candidates.
        rejected: Those that failed or gave another result, each with why.
        stored: It comes from an earlier run.
    """

    direction: str
    config: KernelConfig
    tma: bool
    us: float
    shipped_us: float
    tried: int
    rejected: tuple[str, ...] = ()
    stored: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, to be stored."""
        return {
            "config": tuned.encode_one(self.config, self.tma), "us": round(self.us, 3),
            "shipped_us": round(self.shipped_us, 3), "tried": self.tried, "rejected": list(self.rejected),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, direction: str, data: dict[str, Any]) -> Outcome:
        """The inverse; raises ValueError, KeyError or TypeError for anything else."""
        config, tma = tuned.decode_one(data["config"])
        times = float(data["us"]), float(data["shipped_us"])
        return cls(direction, config, tma, *times, int(data["tried"]), tuple(map(str, data["rejected"])), True)

    def __str__(self) -> str:
        c = self.config
        text = f"{self.direction}: {c.block_m} x {c.block_n}, {c.num_warps} warps, {c.num_stages} stages"
        text += f"{', descriptors' if self.tma else ''}{', merged' if c.merged else ''}: {self.us:.1f} us, "
        text += f"shipped {self.shipped_us:.1f} us, {self.tried} candidates"
        if self.rejected:
            text += f", {len(self.rejected)} rejected ({'; '.join(self.rejected)})"
        return text


class _Plan(NamedTuple):
    """The launches of a call, and what they fill."""

    launches: list[Launch]
    results: dict[str, Tensor]

    def of(self, direction: str) -> Launch:
        return next(launch for launch in self.launches if launch.direction == direction)

    def run(self) -> None:
        for result in self.results.values():
            if result.is_floating_point():
                result.fill_(math.nan)
        for launch in self.launches:
            launch.run()


_Planner = Callable[[dict[str, Any], Tuning], _Plan]


def tune(
    problems: Sequence[dict[str, Any]], output_mask: Sequence[bool], store: MutableMapping[str, Any], device: Device
) -> list[Outcome]:
    """Choose the configuration of each kernel of a call.

    Args:
        problems: The arguments of attention.attention_forward by name, on real tensors; several of the same sizes if
            the call must not find its keys in a cache.
        output_mask: As for attention_backward; all False if no gradient is wanted.
        store: Outcomes as plain data; what is in it is not measured again, what is measured is added.
        device: Compiles and measures.

    Returns:
        One outcome per kernel, in order of launch.
    """
    outcomes = _tune_pass(_plan_forward, problems, store, device)
    if any(output_mask):
        grads = []
        for arguments in problems:
            plan = _plan_forward(arguments, Tuning())
            plan.run()
            rest = {name: value for name, value in arguments.items() if name != "out_layout"}
            out = plan.results["out"]
            # A generator of its own: the program's random numbers stay what they are without tuning.
            generator = torch.Generator(out.device).manual_seed(1)
            grad_out = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
            grads.append({**rest, **plan.results, "grad_out": grad_out, "output_mask": list(output_mask)})
        outcomes += _tune_pass(_plan_backward, grads, store, device)
    return outcomes


def text_of(outcomes: Sequence[Outcome]) -> str:
    """The choices as the text that the op's `impl` argument takes along."""
    return tuned.encode(tuple((outcome.direction, outcome.config, outcome.tma) for outcome in outcomes))


def _plan_forward(arguments: dict[str, Any], tuning: Tuning) -> _Plan:
    launches, out, lse = forward_launches(**arguments, tuning=tuning)
    return _Plan(launches, {"out": out, "lse": lse})


def _plan_backward(arguments: dict[str, Any], tuning: Tuning) -> _Plan:
    launches, tensors = backward_launches(**arguments, tuning=tuning)
    return _Plan(launches, {name: tensors[name] for name in ("dq", "dk", "dv", "dbias") if tensors[name].numel()})


def _tune_pass(
    planner: _Planner, problems: Sequence[dict[str, Any]], store: MutableMapping[str, Any], device: Device
) -> list[Outcome]:
    shipped = [planner(arguments, Tuning()) for arguments in problems]
    arch, _ = device_arch(problems[0]["q"].device)
    found: dict[str, Outcome] = {}
    tried: dict[str, list[tuple]] = {}
    for launch in shipped[0].launches:
        if launch.direction:
            try:
                found[launch.direction] = Outcome.from_dict(launch.direction, store[key_of(launch)])
            except (KeyError, ValueError, TypeError):
                tried[launch.direction] = _candidates(launch, arch)
    if tried:
        device.compile(
            [
                _like(shipped[0].of(direction), planner(problems[0], _tuning(direction, candidate)).of(direction))
                for direction, several in tried.items()
                for candidate in several
            ]
        )
        for direction, several in tried.items():
            outcome = _tune_kernel(planner, problems, shipped, direction, several, device)
            found[direction] = outcome
            store[key_of(shipped[0].of(direction))] = outcome.to_dict()
    return [found[launch.direction] for launch in shipped[0].launches if launch.direction]


def _tune_kernel(
    planner: _Planner, problems: Sequence[dict[str, Any]], shipped: Sequence[_Plan], direction: str,
    several: list[tuple], device: Device,
) -> Outcome:  # fmt: skip
    _run_all(shipped)
    want = {name: result.clone() for name, result in shipped[0].results.items()}
    tolerance = _tolerance(shipped[0].of(direction))
    times: dict[tuple, float] = {}
    rejected = []
    for candidate in several:
        name = tuned.encode_one(*candidate)
        plans = list(shipped)
        try:
            if candidate != several[0]:
                plans = [planner(arguments, _tuning(direction, candidate)) for arguments in problems]
                _run_all(plans)
                wrong = next(_differences(want, plans[0].results, tolerance), None)
                if wrong:
                    rejected.append(f"{name} differs: {wrong}")
                    continue
            times[candidate] = device.microseconds([plan.of(direction) for plan in plans])
            log.debug("%s %s: %.1f us", direction, name, times[candidate])
        except Exception as error:  # of Triton or the driver, whose classes depend on the version
            rejected.append(
                f"{name} fails: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            )
    if several[0] not in times:
        raise RuntimeError(f"the shipped configuration of {direction} could not be timed: {'; '.join(rejected)}")
    best = min(times, key=lambda candidate: times[candidate])
    before = times[several[0]]
    if best != several[0]:
        plans = [planner(arguments, _tuning(direction, best)) for arguments in problems]
        _run_all(plans)
        again = device.microseconds([plan.of(direction) for plan in plans])
        before_again = device.microseconds([plan.of(direction) for plan in shipped])
        if times[best] > before * (1 - NOISE) or again > before_again * (1 - NOISE):
            best = several[0]
    return Outcome(direction, *best, times[best], before, len(several), tuple(rejected))


def _run_all(plans: Sequence[_Plan]) -> None:
    """Run whole calls: a kernel that is timed afterwards reads what those before it wrote, as ranges of blocks."""
    for plan in plans:
        plan.run()


def _like(shipped: Launch, launch: Launch) -> Launch:
    """The launch on the tensors of the shipped one: to be compiled it needs no results of its own."""
    shared = {name: value for name, value in shipped.arguments.items() if isinstance(value, Tensor)}
    kept = {name: value for name, value in launch.arguments.items() if not isinstance(value, Tensor)}
    return replace(launch, arguments={**launch.arguments, **shared, **kept})


def _tuning(direction: str, candidate: tuple) -> Tuning:
    return Tuning(chosen=((direction, *candidate),))


def _candidates(launch: Launch, arch: str) -> list[tuple]:
    given = launch.arguments
    assert launch.config is not None
    q = base_of(given["q"])
    itemsize = q.element_size()
    blocks = given["BLOCK_D"], given["BLOCK_REST"], given["BLOCK_E"]
    bias = base_of(given["attn_bias"])
    bias_itemsize = bias.element_size() if bias is not None else 1 if given["HAS_ATTN_MASK"] else 0
    problem = Problem(arch, launch.direction, blocks, itemsize, bias_itemsize)
    size = configs.head_size(blocks, given["V_HEAD_DIM"])
    plain = configs.select_tma(arch, launch.direction, size, itemsize) if given["TMA"] else None
    return candidates(problem, launch.config, given["TMA"], plain)


_CHOSEN = {"BLOCK_M", "BLOCK_N", "MERGED", "SHIFT", "BIAS"}
"""Kernel arguments that depend on the configuration."""


def key_of(launch: Launch) -> str:
    """The shape class of a kernel's launch: what was compiled in, and sizes up to the next power of two."""
    given = launch.arguments
    q = base_of(given["q"])
    kv_heads = given["batch_size"] * (given["num_heads"] // given["gqa_group_size"])
    sizes = [f"{name}{_size_class(n)}" for name, n in (("q", given["q_len"]), ("kv", given["kv_len"]), ("h", kv_heads))]
    flags = [f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(given.items())
             if name.isupper() and name not in _CHOSEN]  # fmt: skip
    group = f"g{given['gqa_group_size']}"
    return " ".join([launch.direction, str(q.dtype).removeprefix("torch."), *sizes, group, *flags])


def _size_class(size: int) -> int:
    return size if size <= 16 else configs.power_of_two(size)


def _tolerance(launch: Launch) -> float:
    """How far two right results of a kernel may be from each other, relative to their norm.

    Both round the weights to the inputs' dtype, each relative to another maximum, and add up in another order.
    """
    q = base_of(launch.arguments["q"])
    eps = 2.0**-10 if launch.arguments["PRECISION"] == "tf32" else torch.finfo(q.dtype).eps
    return max(eps, 16 * torch.finfo(torch.float32).eps)


def _differences(want: dict[str, Tensor], got: dict[str, Tensor], tolerance: float) -> Iterator[str]:
    """What of a candidate's result is further from the shipped configuration's than rounding explains."""
    for name, exact in want.items():
        a, b = exact.float(), got[name].float()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            yield f"{name} is not finite elsewhere"
            continue
        a, b = a[finite], b[finite]
        if not a.numel():
            continue
        error, size = (b - a).norm().item(), a.norm().item()
        worst, largest = (b - a).abs().max().item(), a.abs().max().item()
        if error > tolerance * size or worst > 8 * tolerance * largest:
            yield f"{name} by {error / size if size else math.inf:.1e} of its norm, {worst:.1e} at most"


def gpu() -> Device:
    """The current GPU."""
    return GpuDevice()


def store_of(device: torch.device, digest: str) -> TunedStore:
    """Where the outcomes for a device are kept.

    Args:
        device: Its model counts: architecture and number of compute units.
        digest: Hash of the kernel sources.
    """
    arch, num_units = device_arch(device)
    name = f"{arch}-{num_units}-triton{triton.__version__}-{digest[:16]}.json"
    return TunedStore(cache_folder() / "tuned" / name)
