"""Each private PyTorch name we use still does what we rely on."""

import torch

from rocm_attn_compile import _torch_private


def test_inductor_option_names_has_known_options():
    names = _torch_private.inductor_option_names()
    assert {"max_autotune", "triton.cudagraphs", "epilogue_fusion"} <= set(names)


def test_check_inductor_options_rejects_names_and_types():
    import pytest

    _torch_private.check_inductor_options({"max_autotune": True, "triton.cudagraphs": False})
    with pytest.raises(RuntimeError, match="no_such_option"):
        _torch_private.check_inductor_options({"no_such_option": 1})
    with pytest.raises(RuntimeError, match="max_autotune"):
        _torch_private.check_inductor_options({"max_autotune": "yes"})


def test_trace_artifact_reaches_the_structured_log():
    import logging

    from torch._logging._internal import trace_log

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    level = trace_log.level
    trace_log.addHandler(handler)
    trace_log.setLevel(logging.DEBUG)
    try:
        _torch_private.trace_artifact("rocm_attn_test", lambda: "the payload")
    finally:
        trace_log.removeHandler(handler)
        trace_log.setLevel(level)
    (record,) = [r for r in records if getattr(r, "metadata", {}).get("artifact", {}).get("name") == "rocm_attn_test"]
    assert record.payload == "the payload"


def test_uncompiled_undoes_torch_compile():
    def function(x):
        return x + 1

    module = torch.nn.Linear(2, 2)
    assert _torch_private.uncompiled(torch.compile(function, backend="eager")) is function
    assert _torch_private.uncompiled(torch.compile(module, backend="eager")) is module
    assert _torch_private.uncompiled(function) is function
    assert _torch_private.uncompiled(module) is module


def test_recompile_limits_lifted_allows_more_than_the_limit():
    torch._dynamo.reset()
    compiled = []

    def backend(gm, inputs):
        compiled.append(gm)
        return gm.forward

    def function(x, n):
        return x + n

    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        run = torch.compile(function, backend=backend, dynamic=False)
        for n in range(3):
            with _torch_private.recompile_limits_lifted():
                run(torch.ones(2), n)
    assert len(compiled) == 3
    torch._dynamo.reset()


def test_graph_break_reason_names_the_break():
    torch._dynamo.reset()
    reasons = []

    def backend(gm, inputs):
        reasons.append(_torch_private.graph_break_reason(gm))
        return gm.forward

    def function(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(function, backend=backend)(torch.ones(2))
    assert reasons[0] is not None
    assert "graph_break" in reasons[0]
    assert reasons[1:] == [None]
    torch._dynamo.reset()


def test_cpu_allocations_are_listed_in_order():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tensor = torch.empty(1000, dtype=torch.uint8)
        del tensor
        tensor = torch.empty(3000, dtype=torch.uint8)
        del tensor
    assert _torch_private.cpu_allocations(profile) == [1000, -1000, 3000, -3000]


def test_module_compile_suspended_runs_the_compilation_asked_for():
    ran = []

    def backend(name):
        def compiler(gm, inputs):
            ran.append(name)
            return gm.forward

        return compiler

    class Module(torch.nn.Module):
        def forward(self, x):
            return x + 1

    module = Module()
    module.compile(backend=backend("module.compile"))
    with _torch_private.module_compile_suspended(module):
        torch.compile(module, backend=backend("torch.compile"))(torch.ones(1, 2))
    assert ran == ["torch.compile"]
    module(torch.ones(1, 2))
    assert ran == ["torch.compile", "module.compile"]
    with _torch_private.module_compile_suspended(torch.sin):
        pass


def test_source_of_reads_dynamos_stack_traces():
    traces = []

    def backend(gm, inputs):
        traces.extend(node.stack_trace for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def function(x):
        return attention(x, x, x)[0]

    torch.compile(function, backend=backend)(torch.ones(1, 3, 8))
    source, code = _torch_private.source_of(traces[0])
    assert source.rpartition(":")[0] == __file__
    assert code == "return attention(x, x, x)[0]"
    assert _torch_private.source_of(None) == ("unknown", "")
    inside = 'File "/site-packages/torch/nn/functional.py", line 7, in f\n    x = y\n'
    assert _torch_private.source_of(inside) == ("/site-packages/torch/nn/functional.py:7", "x = y")


def test_schema_arguments_are_named_in_order_with_defaults():
    arguments = _torch_private.schema_arguments(torch.ops.aten.slice.Tensor)
    assert arguments == (("self", None), ("dim", 0), ("start", None), ("end", None), ("step", 1))
    assert _torch_private.schema_arguments(torch.ops.aten.add.Tensor)[2] == ("alpha", 1)


def test_add_guard_recompiles_when_it_fails_and_finds_the_old_code_again():
    compiled = []
    state = {"value": 1}

    def backend(gm, inputs):
        saved = dict(state)
        compiled.append(saved)
        assert _torch_private.add_guard(lambda: state == saved, "the state is as it was")
        return gm.forward

    run = torch.compile(lambda x: x + 1, backend=backend)
    for value in (1, 1, 2, 2, 1):
        state["value"] = value
        run(torch.ones(2))
    assert compiled == [{"value": 1}, {"value": 2}]
    assert not _torch_private.add_guard(lambda: True, "outside a compilation")
