"""Attention kernels for every model under `torch.compile(model, backend="rocm_attn")`.

Public names: `rocm_attn` (the Dynamo backend as a callable), `explain`, `reports` and `reset_reports`, `Options`,
`StrictError`, `RocmAttnWarning`.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # never installed by us: it would replace a ROCm build
    raise ImportError(
        "rocm_attn_compile needs PyTorch (2.11 to 2.13), which it does not install itself; "
        "install the build for your machine first, for ROCm or CPU, from pytorch.org"
    ) from error

from .backends.select import StrictError
from .compiler import rocm_attn
from .env import RocmAttnWarning, package_version
from .explain import explain
from .options import Options
from .report import reports, reset_reports

__version__ = package_version()
__all__ = [
    "Options",
    "RocmAttnWarning",
    "StrictError",
    "__version__",
    "explain",
    "reports",
    "reset_reports",
    "rocm_attn",
]
