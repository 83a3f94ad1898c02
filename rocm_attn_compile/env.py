"""A snapshot of what the choice of a backend depends on: target architecture, packages, flags.

Taken once per compiled graph (`Environment.current`), so that every site of the graph is decided on the same facts
and the report can print them. Nothing is imported to probe it: `import aiter` compiles code or fails off ROCm.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .options import Options

ARCH_VARIABLE = "ROCM_ATTN_ARCH"

GFX9 = ("gfx90a", "gfx942", "gfx950")
"""What the documented rules call gfx9: the CDNA architectures from MI200 on, not gfx906 or gfx908."""


class RocmAttnWarning(UserWarning):
    """Category of every warning of this package, so that a filter can name it."""


@dataclass(frozen=True)
class Flags:
    """The environment variables of the documented selection rules, with vLLM 0.12's defaults.

    A flag is true iff its text, lower-cased and not stripped, is "true" or "1". Any other text is false, also for the
    flags that are true by default.

    Attributes:
        attention_backend: `VLLM_ATTENTION_BACKEND` as it is, not validated here; None if unset ("" is not unset).
        use_aiter: `VLLM_ROCM_USE_AITER`.
        use_aiter_mha: `VLLM_ROCM_USE_AITER_MHA`.
        use_aiter_unified: `VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION`.
        use_aiter_mla: `VLLM_ROCM_USE_AITER_MLA`.
        prefill_decode: `VLLM_V1_USE_PREFILL_DECODE_ATTENTION`.
    """

    attention_backend: str | None = None
    use_aiter: bool = False
    use_aiter_mha: bool = True
    use_aiter_unified: bool = False
    use_aiter_mla: bool = True
    prefill_decode: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Flags:
        """Read all flags; never fails."""
        values = {
            name: environ[variable].lower() in ("true", "1")
            for name, variable in FLAG_VARIABLES.items()
            if variable in environ
        }
        return cls(attention_backend=environ.get("VLLM_ATTENTION_BACKEND"), **values)


FLAG_VARIABLES = {
    "use_aiter": "VLLM_ROCM_USE_AITER",
    "use_aiter_mha": "VLLM_ROCM_USE_AITER_MHA",
    "use_aiter_unified": "VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION",
    "use_aiter_mla": "VLLM_ROCM_USE_AITER_MLA",
    "prefill_decode": "VLLM_V1_USE_PREFILL_DECODE_ATTENTION",
}
"""Field of `Flags` -> variable, for the boolean ones."""


@dataclass(frozen=True)
class AiterPackage:
    """Which package the import name `aiter` belongs to: two unrelated projects use it.

    Attributes:
        is_amd: It is AMD's (distribution `amd-aiter`).
        version: Of the distribution, if its metadata is there.
        location: Folder it would be imported from; None if there is none.
    """

    is_amd: bool = False
    version: str | None = None
    location: str | None = None

    @classmethod
    def find(cls) -> AiterPackage:
        """Look for it on `sys.path` without importing it."""
        # A stub put into sys.modules may have no __spec__, for which find_spec raises.
        try:
            spec = importlib.util.find_spec("aiter")
        except ValueError:
            return cls()
        if spec is None:
            return cls()
        folders = [Path(folder) for folder in spec.submodule_search_locations or []]
        for folder in folders:
            if (folder / "jit" / "core.py").is_file() and (folder / "ops" / "mha.py").is_file():
                return cls(is_amd=True, version=_distribution_version("amd-aiter"), location=str(folder))
        return cls(location=str(folders[0]) if folders else spec.origin)

    def __str__(self) -> str:
        if self.is_amd:
            return self.version or "present, version unknown"
        if self.location:
            return "absent (the installed package named aiter is an unrelated project, not AMD's)"
        return "absent"


@dataclass(frozen=True)
class Environment:
    """Everything outside the graph that a decision depends on.

    Attributes:
        arch: Target architecture, "gfx942" or "sm_90"; None where there is no GPU and none was named.
        arch_source: Where `arch` comes from: "device", "option", "variable" or "none".
        device_arch: Architecture of the GPU that is really there, or None.
        device_name: Its marketing name, or None.
        flags: The VLLM_* variables.
        aiter: Which `aiter` is installed.
        versions: Package or toolkit -> version, None where absent.
        block_size: Page size of the KV cache the MLA rules are asked about; None is the default, 16.
        variables: The variables above that are set, as they are.
    """

    arch: str | None = None
    arch_source: str = "none"
    device_arch: str | None = None
    device_name: str | None = None
    flags: Flags = field(default_factory=Flags)
    aiter: AiterPackage = field(default_factory=AiterPackage)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    block_size: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def current(cls, options: Options | None = None, environ: Mapping[str, str] | None = None) -> Environment:
        """Take the snapshot now.

        Args:
            options: Of this compilation; `arch` and `block_size` are used.
            environ: Read instead of `os.environ`, for tests.

        Raises:
            ValueError: The variable `ROCM_ATTN_ARCH` is not an architecture's name.
        """
        environ = os.environ if environ is None else environ
        device_arch, device_name = _device()
        option_arch = options.arch if options is not None else None
        variable_arch = environ.get(ARCH_VARIABLE) or None
        arch: str | None
        if variable_arch is not None:
            arch, source = normalize_arch(variable_arch, ARCH_VARIABLE), "variable"
        elif option_arch is not None:
            arch, source = option_arch, "option"
        else:
            arch, source = device_arch, "device" if device_arch else "none"
        env = cls(
            arch=arch,
            arch_source=source,
            device_arch=device_arch,
            device_name=device_name,
            flags=Flags.from_environ(environ),
            aiter=AiterPackage.find(),
            versions=_versions(),
            block_size=options.block_size if options is not None else None,
            variables={name: environ[name] for name in SELECTION_VARIABLES if name in environ},
        )
        if source == "variable" and option_arch not in (None, arch):
            env.warn(f'{ARCH_VARIABLE}={arch} overrides options["arch"]={option_arch!r}: the environment wins')
        for variable in FLAG_VARIABLES.values():
            text = environ.get(variable, "0")
            if text.lower() not in ("0", "1", "false", "true"):
                env.warn(f'{variable}={text!r} means false: only "1" and "true" are true; set 0 or 1')
        return env

    @property
    def arch_is_explicit(self) -> bool:
        """True if an option or a variable names the target, which then may differ from the machine."""
        return self.arch_source in ("option", "variable")

    def arch_for(self, device: str) -> str | None:
        """The architecture that counts for tensors on `device` ("cuda", which is ROCm too, or "cpu").

        CPU tensors run ATen code whatever GPU is in the machine: for them only an architecture the user named counts.
        """
        return self.arch if device != "cpu" or self.arch_is_explicit else None

    def warn(self, text: str) -> None:
        """Warn once per snapshot, that is once per compiled graph, however many sites say the same."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, RocmAttnWarning, stacklevel=3)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports and `rocm-attn env --json`."""
        return {
            "arch": self.arch,
            "arch_source": self.arch_source,
            "device_arch": self.device_arch,
            "device_name": self.device_name,
            "versions": dict(self.versions),
            "aiter": str(self.aiter),
            "block_size": self.block_size,
            "variables": dict(self.variables),
        }


SELECTION_VARIABLES = ("VLLM_ATTENTION_BACKEND", *FLAG_VARIABLES.values(), ARCH_VARIABLE)
"""Every variable that a choice depends on; all enter the compile cache key."""


def normalize_arch(name: str, where: str = 'options["arch"]') -> str:
    """Strip what the driver appends: "gfx942:sramecc+:xnack-" becomes "gfx942"; "sm_90" stays.

    Args:
        name: As the driver or the user gives it.
        where: What to blame in the error.

    Raises:
        ValueError: It is neither an AMD nor an NVIDIA architecture's name.
    """
    base = name.split(":", 1)[0]
    if not re.fullmatch(r"gfx[0-9]+[0-9a-f]{2}|sm_[0-9]{2,3}[a-z]?", base):
        raise ValueError(f'{where} is {name!r}; give an architecture such as "gfx942", "gfx1100" or "sm_90"')
    return base


def _device() -> tuple[str | None, str | None]:
    """Architecture and name of the current GPU, `(None, None)` without one."""
    if not torch.cuda.is_available():
        return None, None
    try:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    except RuntimeError:  # a forked child may not touch the parent's GPU
        return None, None
    if torch.version.hip:
        return normalize_arch(properties.gcnArchName, "the driver's architecture"), properties.name
    return f"sm_{properties.major}{properties.minor}", properties.name


@lru_cache(maxsize=1)
def _versions() -> Mapping[str, str | None]:
    """Versions that cannot change while the process lives."""
    triton_names = ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton")
    triton = next(filter(None, map(_distribution_version, triton_names)), None)
    if triton is None and importlib.util.find_spec("triton") is not None:
        triton = "present, version unknown"
    return {
        "rocm_attn_compile": package_version(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": str(torch.__version__),
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        "triton": triton,
        "transformers": _distribution_version("transformers"),
    }


def package_version() -> str:
    """Our own version; "unknown" when run from a folder that was never installed."""
    return _distribution_version("rocm-attn-compile") or "unknown"


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
