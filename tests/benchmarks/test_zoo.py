"""benchmarks/zoo.py: the count of sites is independent of our recogniser, so it is tested by itself."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from zoo_lib.children import in_children
from zoo_lib.judge import Case, _with_rounded_results, compare
from zoo_lib.plan import everything
from zoo_lib.rows import compact, newest
from zoo_lib.table import page
from zoo_lib.watch import SiteWatch

X = torch.randn(2, 3, 7, 8)


class Program(nn.Module):
    """A model made of one function of activations and a weight."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.function(x, self.weight)


def attention(x, weight):
    q, k, v = x @ weight, x * 2, x + 1
    return (q @ k.mT / 3).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1) @ v


def attention_by_exp(x, weight):
    e = (x @ x.mT).exp()
    return (e / e.sum(-1, keepdim=True)) @ x


def attention_with_sinks(x, weight):
    s = torch.cat([x @ x.mT, torch.zeros(2, 3, 7, 1)], -1)
    return s.softmax(-1)[..., :-1] @ x


def talking_heads(x, weight):
    mix = weight[:3, :3]
    s = ((x @ x.mT).permute(0, 2, 3, 1) @ mix).permute(0, 3, 1, 2)
    return (s.softmax(-1).permute(0, 2, 3, 1) @ mix).permute(0, 3, 1, 2) @ x


def after_attention(x, weight):  # what attention gives is no score
    return (attention(x, weight) @ weight).softmax(-1) @ weight


def sdpa(x, weight):
    return nn.functional.scaled_dot_product_attention(x, x, x)


def sdpa_that_decomposes(x, weight):
    return nn.functional.scaled_dot_product_attention(x.double(), x.double(), x.double(), dropout_p=1e-9)


def router(x, weight):  # weights of experts scale, they are no factor of a product over experts
    p = (x @ weight).softmax(-1)
    return (p.max(-1, keepdim=True).values * x) @ weight


def pooling(x, weight):  # scored by a parameter alone: no q k^T
    return (x @ weight)[..., 0].softmax(-1).unsqueeze(-2) @ x


def over_queries(x, weight):
    return (x @ x.mT).softmax(-2) @ x


def one_key(x, weight):
    return (x @ x[..., :1, :].mT).softmax(-1) @ x[..., :1, :]


def sdpa_of_one_key(x, weight):
    return nn.functional.scaled_dot_product_attention(x, x[..., :1, :], x[..., :1, :])


@pytest.mark.parametrize(
    ("function", "softmax", "calls"),
    [
        (attention, 1, 0),
        (attention_by_exp, 1, 0),
        (attention_with_sinks, 1, 0),
        (talking_heads, 1, 0),
        (after_attention, 1, 0),
        (sdpa, 0, 1),
        (sdpa_that_decomposes, 0, 1),
        (router, 0, 0),
        (pooling, 0, 0),
        (over_queries, 0, 0),
        (one_key, 0, 0),
        (sdpa_of_one_key, 0, 0),
    ],
)
def test_sites_are_counted_by_watching(function, softmax, calls):
    model = Program(function)
    with torch.no_grad(), SiteWatch(model).watching() as watch:
        model(X)
    assert (watch.softmax.total(), watch.sdpa.total()) == (softmax, calls)
    assert all(line.startswith(f"{__file__}:") for line in (*watch.softmax, *watch.sdpa))


def result(**changes):
    setting = {"name": "m", "attention": "eager", "padded": False, "gradients": False, "lowering": "eager"}
    ran = {"status": "run", "softmax": {"a:1": 2}, "sdpa": {"b:1": 1}, "replaced": {"a:1": 1, "b:1": 2}, "graphs": 1}
    return {
        **setting,
        **ran,
        "refused": [["a:1", "score_op", "why", 1]],
        "accuracy": {"ok": True, "text": ""},
        **changes,
    }


def test_a_row_settles_every_site():
    row = compact(result())
    assert (row["softmax"], row["softmax_replaced"], row["sdpa"], row["sdpa_replaced"]) == (2, 1, 1, 1)
    assert row["missed"] == [["a:1", 1, "score_op", "why"]]
    assert row["extra"] == 1


def test_the_page_names_what_is_wrong_and_what_is_missed():
    wrong = compact(result(name="w", accuracy={"ok": False, "text": "far off"}, control_accuracy={"ok": True}))
    failed = compact({**result(name="f"), "status": "not built", "error": "no weights"})
    rows = newest([compact(result(status="timeout", error="")), compact(result()), wrong, failed])
    assert [row["status"] for row in rows] == ["run", "run", "not built"]
    text = page(rows, 4.0)
    assert "`score_op`" in text
    assert "w (eager, forward): **wrong**: far off" in text
    assert "| transformers | eager, forward | 2 | 2 | 4 | 2 (50.0%) | 2 | 2 (100.0%) | 1 of 2 | - | - |" in text
    assert "- f: not built; no weights" in text


def test_all_settings_of_all_cases_what_is_troubled_and_what_is_slow_first():
    hugging = ["fails", "new", "quick", "slow", "refused"]
    names = {"huggingface": hugging, "vision": ["timm/v"], "others": ["vit-pytorch/o"]}
    fine = {"refused": [], "replaced": {"a:1": 2, "b:1": 1}}
    kept = [result(name="quick", wall=1, **fine), result(name="slow", wall=9, **fine), result(name="refused", wall=2)]
    kept += [result(name="fails", status="not built")]
    tasks = everything(names, [*map(compact, kept)])
    order = list(dict.fromkeys(task.name for task in tasks))
    assert order[:3] == ["refused", "slow", "quick"] and order[-1] == "fails" and len(order) == 7
    assert len({(task.name, *task.setting.values()) for task in tasks}) == len(tasks)
    assert {task.setting["attention"] for task in tasks if task.name == "vit-pytorch/o"} == {"eager"}
    ways = {(task.setting["attention"], task.setting["gradients"]) for task in tasks if task.name == "new"}
    assert ways == {("eager", False), ("eager", True), ("sdpa", False), ("sdpa", True)}
    assert [task.with_peer for task in tasks if task.name == "slow"] == [True, False, False, False, True]


def test_functions_run_in_processes_that_may_die():
    tasks = {
        "good": partial(dict, status="run"),
        "raises": partial(int, "x"),
        "exits": partial(os._exit, 3),
        "never ends": partial(sum, range(10**12)),
        "after": partial(dict, status="run"),
    }
    found = dict(in_children(tasks.items(), prepare=partial(int), jobs=2, timeout=1))
    assert found["good"] == found["after"] == {"status": "run"}
    assert found["raises"]["status"] == "harness error"
    assert (found["exits"]["status"], found["never ends"]["status"]) == ("died", "timeout")


def test_what_does_not_come_in_time_has_no_result():
    tasks = {"never ends": partial(sum, range(10**12)), "never begun": partial(dict)}
    assert not list(in_children(tasks.items(), prepare=partial(int), jobs=1, timeout=60, seconds=2))


def test_a_gradient_that_is_0_but_for_rounding_may_be_another_rounding_of_0():
    eager, ours, exact = [torch.full((4,), 5e-7)], [torch.full((4,), 3e-6)], [torch.zeros(4, dtype=torch.float64)]
    assert not compare(ours, eager, exact)["ok"]
    assert compare(ours, eager, exact, rounded=[eager, [torch.full((4,), 2e-6)]])["ok"]
    assert not compare([torch.full((4,), 1e-3)], eager, exact, rounded=[eager, [torch.full((4,), 2e-6)]])["ok"]


def test_everything_is_rounded_once_more_forward_and_backward():
    model = nn.Linear(8, 8)
    case = Case(model, {"input": X}, gradients=True)
    plain, rounded = case.run(model, model, case.arguments), _with_rounded_results(case)
    for a, b in zip(plain, rounded):
        assert 0 < float((a - b).abs().max()) < 1e-4 * float(a.abs().max())
