"""What a backend is: a declaration of what it can compute, and the reasons that follow from it.

A declaration is data. It is read by the selection, by `rocm-attn backends`, by docs/backends.md and by the tests,
which try every accepted corner and every single violation of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import final

import torch

from ..env import Environment
from ..reasons import Reason
from ..spec import AttentionSpec
from ..symbolic import Size, static
from .features import FEATURE_CODES, feature_reasons, unknown_field_reasons
from .words import dtype_name

HARDWARE_CODES = frozenset({"arch", "package_missing"})
"""Reasons that are about the machine, not the site: fatal for a backend that was named explicitly."""

BASE_CODES = {
    "not_built": "declared, but this version does not run it yet",
    "device": "tensors are neither on a GPU nor on the CPU",
    "arch": "no kernels for the target architecture",
    "device_arch": "kernels for the target, but not for the GPU that the tensors are on",
    "package_missing": "a package it needs is not installed",
    "kind": "made for the other kind of attention (general or MLA)",
    "dtype": "does not take the dtype",
    "head_dim": "does not take the size of queries and keys",
    "v_head_dim": "does not take the size of values",
    "symbolic_head_dim": "head_dim is dynamic",
    "symbolic_v_head_dim": "v_head_dim is dynamic",
    "head_ratio": "query heads are not a multiple of key/value heads",
    "softmax_scale": "the scale is not finite",
    "dropout_p": "the dropout probability is not in [0, 1)",
    "unknown_field": "the spec has a field that the backends do not know",
    "lower_priority": "could take it, but another backend comes first",
}
"""Reason codes that are neither a feature's nor a limit's, with their meaning."""


@dataclass(frozen=True)
class Dims:
    """Head sizes: either the listed ones or every multiple of `multiple` from `low` to `high`."""

    listed: tuple[int, ...] = ()
    low: int = 1
    high: int | None = None
    multiple: int = 1

    def __contains__(self, dim: int) -> bool:
        if self.listed:
            return dim in self.listed
        return self.low <= dim and (self.high is None or dim <= self.high) and dim % self.multiple == 0

    def __str__(self) -> str:
        if self.listed:
            return ", ".join(map(str, self.listed))
        text = f"{self.low} to {self.high}" if self.high is not None else f"{self.low} and up"
        return text if self.multiple == 1 else f"multiples of {self.multiple}, {text}"


ANY_DIM = Dims()


@dataclass(frozen=True)
class Limit:
    """A limit that involves more than one field.

    Attributes:
        code: The `Reason.code` of a violation.
        summary: The limit in words, for the docs.
        violation: What is wrong with this spec, with values, or None.
    """

    code: str
    summary: str
    violation: Callable[[AttentionSpec, Environment], str | None]


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute an attention, declared.

    Attributes:
        name: As in `VLLM_ATTENTION_BACKEND`.
        summary: One sentence for tables.
        built: This project can run it. If not, the reason "not_built" always applies.
        kinds: `AttentionSpec.kind`s it takes.
        archs: Patterns of architectures its kernels exist for; "*" is any, "gfx*" any of AMD's.
        dtypes: Of q, k, v and the output.
        head_dims, v_head_dims: Sizes it takes, of keys and of values.
        takes: Codes of `features.FEATURES` it computes; every other feature is refused.
        limits: What involves several fields.
        package: "aiter" or "triton" if it needs that package.
        package_on_cpu: CPU tensors need the package too. They always run the op's ATen implementation, so this is
            about what was asked for: a backend that *is* the package cannot be said to run without it.
        cpu_dtypes: Further dtypes on CPU tensors without an explicit architecture.
        cpu_any_dim: Any head size is taken on CPU tensors without an explicit architecture.
    """

    name: str
    summary: str
    built: bool
    kinds: frozenset[str]
    archs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: Dims
    v_head_dims: Dims
    takes: frozenset[str]
    limits: tuple[Limit, ...] = ()
    package: str | None = None
    package_on_cpu: bool = True
    cpu_dtypes: tuple[torch.dtype, ...] = ()
    cpu_any_dim: bool = False

    def __post_init__(self) -> None:
        unknown = self.takes - FEATURE_CODES
        assert not unknown, f"{self.name} takes unknown features {sorted(unknown)}"

    @final
    def reasons(self, spec: AttentionSpec, env: Environment) -> list[Reason]:
        """Every reason why this backend cannot take the site; none means it can.

        Args:
            spec: The proved attention.
            env: Of this compilation.
        """
        return [
            *self._machine_reasons(spec, env),
            *self._value_reasons(spec, env),
            *feature_reasons(spec, self.takes),
            *unknown_field_reasons(spec),
            *self._limit_reasons(spec, env),
        ]

    def _machine_reasons(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if not self.built:
            yield Reason("not_built", f"{self.name} is declared, but this version does not run it yet")
        on_cpu = spec.device == "cpu"
        if spec.device not in ("cpu", "cuda"):
            yield Reason("device", f"tensors are on {spec.device!r}; only cuda (which is ROCm too) and cpu are taken")
        arch = env.arch_for(spec.device)
        if arch is None and not on_cpu and self.archs != ("*",):
            yield Reason("arch", f"no architecture is known; needs {self._archs_text}; set options={{'arch': ...}}")
        elif arch is not None and not self.runs_on(arch):
            yield Reason("arch", f"has kernels for {self._archs_text}, the target is {arch} (from {env.arch_source})")
        elif not on_cpu and env.device_arch is not None and not self.runs_on(env.device_arch):
            # The user targets another machine; its kernels would fail on this one.
            text = f"{arch} is targeted, but the tensors are on {env.device_arch}, which has no kernels of it"
            yield Reason("device_arch", text)
        if self.package and (self.package_on_cpu or not on_cpu) and not _has_package(self.package, env):
            found = str(env.aiter) if self.package == "aiter" else "absent"
            hint = "install amd-aiter (ROCm/aiter)" if self.package == "aiter" else f"install {self.package}"
            yield Reason("package_missing", f"needs the package {self.package}, which is {found}; {hint}")

    def _value_reasons(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if spec.kind not in self.kinds:
            yield Reason("kind", f"takes {_listing(sorted(self.kinds))}, this site is {spec.kind!r}")
        reference = spec.device == "cpu" and not env.arch_is_explicit
        dtypes = self.dtypes + (self.cpu_dtypes if reference else ())
        if spec.dtype not in dtypes:
            yield Reason("dtype", f"dtype={dtype_name(spec.dtype)}; takes {_listing(map(dtype_name, dtypes))}")
        any_dim = reference and self.cpu_any_dim
        yield from _dim_reasons("head_dim", spec.head_dim, ANY_DIM if any_dim else self.head_dims)
        yield from _dim_reasons("v_head_dim", spec.v_head_dim, ANY_DIM if any_dim else self.v_head_dims)
        heads, kv_heads = static(spec.num_heads), static(spec.num_kv_heads)
        if heads is not None and kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
            yield Reason("head_ratio", f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}")
        if not math.isfinite(spec.softmax_scale):
            yield Reason("softmax_scale", f"softmax_scale={spec.softmax_scale} is not finite")
        if not 0 <= spec.dropout_p < 1:
            yield Reason("dropout_p", f"dropout_p={spec.dropout_p} is not in [0, 1)")

    def _limit_reasons(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        for limit in self.limits:
            text = limit.violation(spec, env)
            if text is not None:
                yield Reason(limit.code, text)

    def runs_on(self, arch: str) -> bool:
        """True if it has kernels for the architecture."""
        return any(fnmatchcase(arch, pattern) for pattern in self.archs)

    @property
    def _archs_text(self) -> str:
        return _listing("any AMD GPU" if pattern == "gfx*" else pattern for pattern in self.archs)


def _dim_reasons(name: str, size: Size, dims: Dims) -> Iterator[Reason]:
    dim = static(size)
    if dim is None:
        yield Reason(f"symbolic_{name}", f"{name}={size} is dynamic; kernels are chosen by it, so it must be constant")
    elif dim not in dims:
        yield Reason(name, f"{name}={dim}; takes {dims}")


def _has_package(name: str, env: Environment) -> bool:
    # The name aiter belongs to two projects, so finding it is not enough.
    return env.aiter.is_amd if name == "aiter" else find_spec(name) is not None


def _listing(names) -> str:
    return ", ".join(names)
