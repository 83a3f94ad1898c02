"""Weights for models that nobody trained."""

from __future__ import annotations

import torch


def randomize(model: torch.nn.Module) -> None:
    """Weights as large as in a trained model, so that attention is not uniform and no parameter is without effect."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if parameter.ndim >= 2:
                parameter.normal_(0, (1.0 / max(parameter[0].numel(), 1)) ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
