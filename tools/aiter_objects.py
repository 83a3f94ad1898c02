"""AITER's assembly flash attention forward kernels, found in a checkout of it: for tests and figures.

Nothing of AITER is part of this repository. A checkout has, in hsa/<architecture>/fmha_v3_fwd, a code object per kernel
and fmha_fwd.csv, which says which is for what.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from gcnsim.code_object import CodeObject, load_code_object

VARIABLE = "AITER_CHECKOUT"
ARCHS = ("gfx942", "gfx950")
ROUNDINGS = {"gfx942": {"rtne": "0", "rtna": "1", "rtz": "2"}, "gfx950": {"": "0"}}
"""How the probabilities become bf16, with its number in the table. gfx950 has an instruction for it."""
_FOLDERS = {"gfx942": "MI300", "gfx950": ""}


@dataclass(frozen=True)
class ForwardKernel:
    """One code object, loaded.

    Attributes:
        name: Of its file, without the ending.
        q_tile: Queries of a workgroup.
        threads: Of a workgroup.
        loaded: For gcnsim.run.
    """

    name: str
    q_tile: int
    threads: int
    loaded: CodeObject


def checkout() -> Path | None:
    """What $AITER_CHECKOUT names; None if it is not set.

    Raises:
        ValueError: It names something else.
    """
    if not os.environ.get(VARIABLE):
        return None
    path = Path(os.environ[VARIABLE])
    if not (path / "hsa").is_dir():
        raise ValueError(f"{VARIABLE}={path} is not a checkout of github.com/ROCm/aiter: it has no folder hsa")
    return path


def forward_kernel(root: Path, arch: str, causal: bool, rounding: str) -> ForwardKernel:
    """Load the bf16 kernel of head size 128 for a batch of equal lengths.

    Args:
        root: The checkout.
        arch: One of ARCHS.
        causal: Whether a query sees no later keys, the last query and the last key aligned.
        rounding: A key of ROUNDINGS[arch].

    Raises:
        LookupError: The table does not have exactly one such kernel.
    """
    folder = root / "hsa" / arch / "fmha_v3_fwd"
    wanted = {
        "dtype": "bf16", "hdim_q": "128", "hdim_v": "128", "mask": "2" if causal else "0", "mode": "0",
        "bf16_cvt": ROUNDINGS[arch][rounding],
    }  # fmt: skip
    with open(folder / "fmha_fwd.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    if len(rows) != 1:
        raise LookupError(f"{folder / 'fmha_fwd.csv'} has {len(rows)} rows with {wanted}, expected one")
    path = folder / _FOLDERS[arch] / rows[0]["co_name"]
    loaded = load_code_object(path.read_bytes(), arch, rows[0]["knl_name"])
    threads = loaded.kernel.metadata["max_flat_workgroup_size"]
    return ForwardKernel(path.stem, int(rows[0]["ts_qo"]), threads, loaded)
