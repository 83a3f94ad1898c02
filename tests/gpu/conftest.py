"""What the tests on a GPU share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def default_gpu():
    """Tensors are made on the GPU, and float32 products are exact."""
    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.set_default_device("cpu")
