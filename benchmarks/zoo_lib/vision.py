"""Vision models of timm, one of each module that has attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .judge import Case
from .randomize import randomize

MODELS = Path(__file__).with_name("timm_models.txt").read_text().split()
_STAGES = (1, 1, 1, 1)
_SMALLER: list[dict[str, Any]] = [
    {"img_size": 64, "depth": 1},
    {"img_size": 64, "depths": _STAGES},
    {"img_size": 64},
    {"depths": _STAGES},
    {"layers": _STAGES},
    {"depth": 1},
    {},
]


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
    for small in _SMALLER:
        try:
            torch.manual_seed(0)
            model = timm.create_model(name.removeprefix("timm/"), num_classes=10, **small).eval()
            randomize(model)
            arguments = _image(model, small)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:100]}")
            continue
        return Case(model, arguments, gradients), {"class": type(model).__name__, "settings": str(small)}
    raise RuntimeError("; ".join(errors))


def _image(model: torch.nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The smallest image that the model takes."""
    sizes = [settings.get("img_size", 64), 128, model.default_cfg["input_size"][-1]]
    for size in sizes:
        torch.manual_seed(1)
        arguments = {"x": torch.randn(2, 3, size, size)}
        try:
            with torch.no_grad():
                model(**arguments)
        except Exception:
            if size == sizes[-1]:
                raise
        else:
            break
    return arguments
