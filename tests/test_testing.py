"""The shipped test helpers notice what they are for, and let pass what they should."""

import pytest
import torch
import torch.nn.functional as F

from rocm_attn_compile.testing import (
    Float64Everywhere,
    RoundedAgain,
    accuracy,
    assert_as_accurate_as_eager,
    assert_same_computation,
    count_calls,
    peak_memory,
    to_float64,
)


@pytest.fixture
def products():
    """A matmul in bfloat16 by eager, its float64 result, and the same rounded once."""
    left, right = torch.randn(37, 65, dtype=torch.bfloat16), torch.randn(65, 29, dtype=torch.bfloat16)
    exact = left.double() @ right.double()
    return left @ right, exact, exact.to(torch.bfloat16)


def test_as_good_as_eager_passes(products):
    eager, exact, rounded_once = products
    assert_as_accurate_as_eager(eager, eager, exact)
    assert_as_accurate_as_eager(rounded_once, eager, exact)


def test_one_wrong_entry_is_noticed(products):
    eager, exact, _ = products
    wrong = eager.clone()
    wrong[3, 4] += 0.25 * exact.abs().max()
    with pytest.raises(AssertionError, match="less accurate than eager"):
        assert_as_accurate_as_eager(wrong, eager, exact)


def test_small_errors_everywhere_are_noticed(products):
    eager, exact, rounded_once = products
    spread = rounded_once + (rounded_once * 0.02)  # below the largest error that bfloat16 allows, but in every entry
    measured = accuracy(spread, rounded_once, exact)
    assert measured.rms_error > 3 * measured.eager_rms_error
    assert not measured.ok


def test_exact_eager_allows_one_rounding():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = exact.float()
    assert_as_accurate_as_eager(eager * (1 + torch.finfo(torch.float32).eps), eager, exact)
    with pytest.raises(AssertionError, match="less accurate"):
        assert_as_accurate_as_eager(eager * (1 + 4 * torch.finfo(torch.float32).eps), eager, exact)


@pytest.mark.parametrize("got", [[0.0, 1.0], [float("inf"), 1.0], [float("nan"), float("nan")]])
def test_nan_must_be_where_the_exact_result_has_it(got):
    exact = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    assert_as_accurate_as_eager(exact.float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="NaN or inf"):
        assert_as_accurate_as_eager(torch.tensor(got), exact.float(), exact)


def test_overflow_counts_as_right_where_eager_overflows_too():
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_as_accurate_as_eager(exact.half(), exact.half(), exact)
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_as_accurate_as_eager(torch.tensor([65504.0, 1.0]).half(), exact.half(), exact)


def test_shapes_dtypes_and_structure_must_agree():
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate_as_eager(exact, exact.float(), exact)
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate_as_eager(exact.float()[:2], exact.float(), exact)
    with pytest.raises(AssertionError, match="structure"):
        assert_as_accurate_as_eager((exact.float(),), [exact.float()], (exact,))
    tokens = torch.tensor([1, 2])
    with pytest.raises(AssertionError, match="result 1: differs"):
        assert_as_accurate_as_eager((exact.float(), tokens + 1), (exact.float(), tokens), (exact, tokens))


def test_to_float64_copies_modules_and_trees():
    module = torch.nn.Linear(2, 2)
    assert to_float64(module).weight.dtype == torch.float64
    assert module.weight.dtype == torch.float32
    leaf = torch.ones(2, requires_grad=True)
    tree = to_float64({"x": leaf, "ids": torch.tensor([1]), "n": 3})
    assert tree["x"].dtype == torch.float64 and tree["x"].requires_grad and tree["x"].is_leaf
    assert tree["ids"].dtype == torch.int64 and tree["n"] == 3


def test_float64_everywhere_widens_what_models_do_in_float32():
    def model(x):
        weights = F.softmax(x, dim=-1, dtype=torch.float32) * x.to(torch.float32).pow(2).mean()
        return weights.to(x.dtype) + x.float() + torch.arange(3, dtype=torch.float32).sin() + torch.ones(3)

    x = torch.randn(5, 3, dtype=torch.float64)
    assert model(x).dtype == torch.float64
    with Float64Everywhere():
        exact = model(x)
    assert torch.get_default_dtype() == torch.float32
    oracle = torch.softmax(x, -1) * x.pow(2).mean() + x + torch.arange(3).double().sin() + 1
    torch.testing.assert_close(exact, oracle, rtol=1e-14, atol=1e-14)
    assert (model(x) - oracle).abs().max() > 1e-9, "without it the float64 run is not exact"


def test_count_calls_sees_functions_methods_ops_and_nested_graphs():
    class Model(torch.nn.Module):
        def forward(self, x):
            return F.softmax(torch.ops.aten.mul.Tensor(x.view(-1), 2.0), -1)

    inner = torch.fx.symbolic_trace(Model())
    graph = torch.fx.Graph()
    graph.call_module("inner", (graph.placeholder("x"),))
    outer = torch.fx.GraphModule({"inner": inner}, graph)
    for module in (inner, outer):
        counts = count_calls(module)
        assert counts["aten.mul"] == counts[".view"] == counts["softmax"] == 1, counts


@pytest.mark.parametrize("compiled", [False, True])
def test_peak_memory_counts_what_is_alive_at_once(compiled):
    def function(x):
        square = x @ x  # 4 MB, alive with the softmax of the same size, then both beside the small result
        return (torch.softmax(square, -1) @ x[:, :1]).sum()

    call = torch.compile(function) if compiled else function
    x = torch.randn(1000, 1000)
    call(x)
    assert 7.9e6 < peak_memory(lambda: call(x)) < 9e6
    assert peak_memory(lambda: x.view(-1)) < 1000


def _key_bias_gradient(scores: torch.Tensor) -> torch.Tensor:
    """The gradient of a number that is added to all keys of a row: 0, but for rounding."""
    bias = torch.zeros(scores.shape[0], 1, requires_grad=True)
    values = torch.linspace(-3.0, 5.0, 29).view(29, 1)
    return torch.autograd.grad((torch.softmax(scores + bias, 1) @ values).square().sum(), bias)[0]


def test_rounding_again_changes_results_by_rounding_and_gradients_of_0_by_the_rounding_of_their_terms():
    scores = torch.randn(37, 29)
    plain = torch.softmax(scores, 1)
    with RoundedAgain():
        changed = torch.softmax(scores, 1)
    relative = ((changed - plain) / plain).abs().max()
    assert 0 < relative <= 2 * torch.finfo(torch.float32).eps
    plain_gradient = _key_bias_gradient(scores)
    with RoundedAgain(1):
        again = _key_bias_gradient(scores)
    torch.testing.assert_close(again, plain_gradient, rtol=0, atol=1e-4)
    # p * (dp - sum) with another rounding of the sum: of sizes up to 50
    assert (again - plain_gradient).abs().max() > 5 * torch.finfo(torch.float32).eps


def test_rounding_again_leaves_random_numbers_and_writes_as_they_are():
    torch.manual_seed(3)
    drawn = torch.rand(5)
    buffer = torch.zeros(5)
    torch.manual_seed(3)
    with RoundedAgain():
        again = torch.rand(5)
        buffer.copy_(drawn)
    torch.testing.assert_close(again, drawn, rtol=1e-6, atol=0)
    assert torch.equal(buffer, drawn)


def test_float64_everywhere_draws_the_same_numbers():
    """Of 16 and more numbers PyTorch draws others in float64: the exact run was one of other inputs."""

    def draw():
        torch.manual_seed(0)
        x = torch.randn(5, 7)
        return x, torch.rand(20, dtype=torch.float32), torch.randn_like(x), torch.randn(17, requires_grad=True)

    drawn = draw()
    with Float64Everywhere():
        again = draw()
    assert all(t.dtype == torch.float64 and torch.equal(t, x.double()) for t, x in zip(again, drawn))
    assert again[3].requires_grad and again[3].is_leaf


def test_two_computations_are_not_taken_for_one():
    exact = torch.randn(5, 7, dtype=torch.float64)
    assert_same_computation((exact.bfloat16(), 3), (exact, 3))
    with pytest.raises(AssertionError, match="result 1: eager is no rounding"):
        assert_same_computation((exact.float(), exact.float().flip(0)), (exact, exact))
