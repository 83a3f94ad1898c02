"""What the tests on a GPU share."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    """`hopper` marks what needs an NVIDIA GPU of compute capability 9.0. (AMD's gfx90a says 9, too.)"""
    is_hopper = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
    for item in items:
        if not is_hopper and item.get_closest_marker("hopper"):
            item.add_marker(pytest.mark.skip(reason="a kernel for Hopper"))


@pytest.fixture
def default_gpu():
    """Tensors are made on the GPU, and float32 products are exact."""
    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.set_default_device("cpu")
