"""Vision models of timm, one of each module that has attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .judge import Case
from .randomize import randomize

MODELS = Path(__file__).with_name("timm_models.txt").read_text().split()


def names() -> list[str]:
    """Models by "timm/name"."""
    return [f"timm/{name}" for name in MODELS]


def case(name: str, attention: str, padded: bool, gradients: bool) -> tuple[Case, dict[str, Any]]:
    """The model with the fewest layers and the smallest image that it can be made with.

    Raises:
        RuntimeError: timm has no such model, or it does not run.
    """
    import timm

    timm.layers.set_fused_attn(attention == "sdpa")
    errors = []
    small: dict[str, Any]
    for small in ({"img_size": 64, "depth": 2}, {"img_size": 64}, {"depth": 2}, {}):
        try:
            torch.manual_seed(0)
            model = timm.create_model(name.removeprefix("timm/"), num_classes=10, **small).eval()
            randomize(model)
            size = small.get("img_size") or model.default_cfg["input_size"][-1]
            torch.manual_seed(1)
            arguments = {"x": torch.randn(2, 3, size, size)}
            with torch.no_grad():
                model(**arguments)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:100]}")
            continue
        return Case(model, arguments, gradients), {"class": type(model).__name__, "settings": str(small)}
    raise RuntimeError("; ".join(errors))
