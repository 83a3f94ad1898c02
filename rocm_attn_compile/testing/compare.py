"""How exact is exact enough: as exact as eager in the same dtype, both measured against float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(frozen=True)
class Accuracy:
    """Errors of one tensor, and the errors eager makes, both against float64; in units of the tensor itself.

    Attributes:
        max_error: Largest absolute error, over the finite entries of the exact result.
        rms_error: Root mean square of the errors.
        eager_max_error, eager_rms_error: The same for eager.
        scale: Largest absolute value of the exact result.
        rounding: What one rounding to the dtype can cost at that scale.
        factor: How many times eager's error is allowed.
    """

    max_error: float
    rms_error: float
    eager_max_error: float
    eager_rms_error: float
    scale: float
    rounding: float
    factor: float

    @property
    def ok(self) -> bool:
        """Neither error exceeds `factor` times eager's, or one rounding where eager happens to be exact."""
        return (
            self.max_error <= max(self.factor * self.eager_max_error, self.rounding)
            and self.rms_error <= max(self.factor * self.eager_rms_error, self.rounding)
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.3g} (eager {self.eager_max_error:.3g}), "
            f"rms error {self.rms_error:.3g} (eager {self.eager_rms_error:.3g}), "
            f"allowed {self.factor:g} x eager or one rounding ({self.rounding:.3g}); largest value {self.scale:.3g}"
        )


def accuracy(actual: Tensor, eager: Tensor, exact_float64: Tensor, *, factor: float = 3.0) -> Accuracy:
    """Measure one tensor.

    Args:
        actual: What is tested, any shape and float dtype.
        eager: The same computed by eager PyTorch in the same dtype.
        exact_float64: The same computed in float64 from the same inputs.
        factor: How many times eager's error is allowed. Different orders of summation, each fine, differ by a
            small factor; more than a few is another computation.

    Raises:
        AssertionError: The shapes or dtypes differ, or the entries that are NaN or infinite in the exact result are
            not the same ones, with the same values, in `actual`.
    """
    assert actual.shape == eager.shape == exact_float64.shape, (
        f"shapes differ: got {tuple(actual.shape)}, eager {tuple(eager.shape)}, exact {tuple(exact_float64.shape)}"
    )
    assert actual.dtype == eager.dtype, f"dtype differs: got {actual.dtype}, eager gives {eager.dtype}"
    assert exact_float64.dtype == torch.float64, f"the exact result must be float64, not {exact_float64.dtype}"
    exact = exact_float64.detach().cpu()
    got, reference = (tensor.detach().cpu().to(torch.float64) for tensor in (actual, eager))

    # A finite exact value may overflow the dtype; then eager's own infinity is what is right.
    finite = exact.isfinite() & reference.isfinite()
    expected_special = torch.where(exact.isfinite(), reference, exact)[~finite]
    torch.testing.assert_close(
        got[~finite], expected_special, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"NaN or infinity: {text}"
    )
    assert got[finite].isfinite().all(), (
        f"{int((~got[finite].isfinite()).sum())} of {got.numel()} entries are NaN or infinite where eager's are finite"
    )

    if not bool(finite.any()):
        return Accuracy(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, factor)
    error, eager_error = (got - exact)[finite].abs(), (reference - exact)[finite].abs()
    scale = float(exact[finite].abs().max())
    return Accuracy(
        max_error=float(error.max()),
        rms_error=float(error.square().mean().sqrt()),
        eager_max_error=float(eager_error.max()),
        eager_rms_error=float(eager_error.square().mean().sqrt()),
        scale=scale,
        rounding=torch.finfo(actual.dtype).eps * scale,
        factor=factor,
    )


def assert_as_accurate_as_eager(actual: Any, eager: Any, exact_float64: Any, *, factor: float = 3.0) -> None:
    """Fail if `actual` is further from float64 than `factor` times what eager is in the same dtype.

    Args:
        actual, eager, exact_float64: Tensors, or tuples, lists and dicts of them with the same structure. Entries that
            are not float tensors (None, ints, masks) must be equal. See `accuracy`.
        factor: How many times eager's error is allowed.

    Raises:
        AssertionError: With the place, the errors and what was allowed.
    """
    actual_leaves, structure = tree_flatten(actual)
    eager_leaves, eager_structure = tree_flatten(eager)
    exact_leaves, exact_structure = tree_flatten(exact_float64)
    assert structure == eager_structure == exact_structure, (
        f"results have different structures: {structure}, eager {eager_structure}, exact {exact_structure}"
    )
    for position, (got, want, exact) in enumerate(zip(actual_leaves, eager_leaves, exact_leaves)):
        where = f"result {position}: " if len(actual_leaves) > 1 else ""
        if not isinstance(want, Tensor):
            assert got == want, f"{where}got {got!r}, eager gives {want!r}"
        elif not want.is_floating_point():
            assert isinstance(got, Tensor) and torch.equal(got.cpu(), want.cpu()), f"{where}differs from eager"
        else:
            try:
                measured = accuracy(got, want, exact, factor=factor)
            except AssertionError as error:
                raise AssertionError(f"{where}{error}") from None
            assert measured.ok, f"{where}less accurate than eager: {measured}"


def assert_same_computation(eager: Any, exact_float64: Any) -> None:
    """Fail if eager is not even near to float64: then the two ran on different numbers, and nothing would be too far.

    Args:
        eager, exact_float64: See `assert_as_accurate_as_eager`; not of gradients that are zero but for rounding.
    """
    for position, (got, exact) in enumerate(zip(tree_flatten(eager)[0], tree_flatten(exact_float64)[0])):
        if isinstance(exact, Tensor) and exact.is_floating_point() and exact.numel():
            both = exact.isfinite() & got.isfinite()
            error, scale = ((got.double() - exact)[both].abs().sum(), exact[both].abs().sum())
            assert error <= scale / 4, f"result {position}: eager is no rounding of the float64 run: off by {error:.3g}"


def to_float64(tree: Any) -> Any:
    """A copy of a module, or of a tree of tensors, with every float tensor in float64.

    Tensors are detached leaves and keep `requires_grad`; a module is deep-copied, its other attributes unchanged.
    """
    if isinstance(tree, torch.nn.Module):
        return copy.deepcopy(tree).double()

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = torch.float64 if leaf.is_floating_point() else leaf.dtype
        return leaf.detach().to(dtype, copy=True).requires_grad_(leaf.requires_grad)

    return tree_map(convert, tree)


_DRAWN = (torch.randn, torch.rand, torch.randn_like, torch.rand_like)


class Float64Everywhere(TorchFunctionMode):
    """Within it, code that asks for float32 gets float64: `with Float64Everywhere(): exact = to_float64(model)(...)`.

    Models compute softmax, norms and rotary embeddings in float32 whatever their own dtype, so a model that was only
    converted with `.double()` is no more exact there than the one it is to judge.

    Random tensors hold the numbers that they hold outside: drawn in float32, then widened. (PyTorch draws others in
    float64, and then the exact run would be a run of something else.)
    """

    def __enter__(self) -> Float64Everywhere:
        self._default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.set_default_dtype(self._default_dtype)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            return args[0].double()

        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        kwargs = kwargs or {}
        dtype = kwargs.get("dtype") or self._default_dtype
        if function in _DRAWN and dtype in (torch.float32, self._default_dtype):
            drawn = function(*args, **{**kwargs, "dtype": dtype, "requires_grad": False})
            return drawn.to(torch.float64).requires_grad_(kwargs.get("requires_grad", False))
        return function(*tree_map(widen, args), **tree_map(widen, kwargs))
