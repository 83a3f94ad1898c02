"""What rounding alone may do to a program: eager, with everything that it computes rounded once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rocm_attn_compile import _torch_private


class RoundedAgain(_torch_private.TorchDispatchMode):
    """Within it every float result, forward and backward, is changed at random by at most one unit in its last place.

    So is the sum of each row that the backward of a softmax subtracts, `p * (dp - sum(p * dp))`. Fused attention, that
    of PyTorch, too, computes that sum from the output and its gradient (FlashAttention, Dao et al. 2022, section 3.1
    and appendix B), where eager's cancels against the same rounded `dp`: gradients that are 0 by it, such as that of a
    bias of all keys, are roundings of it in one and of nearly nothing in the other.

    What differs from eager by no more than a few times this change differs by rounding. A gradient of two numbers, or
    one that is 0 but for rounding, can be far more exact in eager than its conditioning lets one expect, by chance.

    Args:
        seed: Of the random numbers, which are its own: those that a program draws stay what they are.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        schema = function._schema
        if schema.is_mutable or any(returned.alias_info is not None for returned in schema.returns):
            return result
        if function is _torch_private.softmax_backward:
            result = self._with_another_sum(result, *args[:3])
        return tree_map(self._rounded, result)

    def _with_another_sum(self, ds: Tensor, dp: Tensor, p: Tensor, dim: int) -> Tensor:
        with _torch_private.without_dispatch_modes():
            size = (p * dp).abs().sum(dim, keepdim=True)
            return ds - p * size * self._units(size)

    def _rounded(self, result: Any) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point() or result.numel() == 0:
            return result
        with _torch_private.without_dispatch_modes():
            return result * (1 + self._units(result))

    def _units(self, like: Tensor) -> Tensor:
        """Numbers between -1 and 1, times one unit in the last place of 1."""
        generator = self._generators.get(like.device)
        if generator is None:
            generator = self._generators[like.device] = torch.Generator(like.device).manual_seed(self._seed)
        drawn = torch.rand(like.shape, generator=generator, dtype=torch.float32, device=like.device)
        return (drawn * 2 - 1).to(like.dtype) * torch.finfo(like.dtype).eps
