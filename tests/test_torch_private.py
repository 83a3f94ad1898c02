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


# --- Capture (capture/) ---


def test_only_fakes_makes_fakes_without_gradient_or_modes():
    x = torch.randn(2, 3, requires_grad=True)
    with torch.inference_mode(), torch.device("meta"), _torch_private.only_fakes(None):
        fake = torch.empty_strided((2, 3), (3, 1), device="cpu")
        assert _torch_private.is_fake(fake) and fake.device.type == "cpu"
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        assert _torch_private.is_fake(torch.ones(2)) and torch.ones(2).device.type == "cpu", "no ambient function mode"
        assert not (x * fake).requires_grad
        with _torch_private.without_dispatch_modes():
            assert not _torch_private.is_fake(torch.ones(2, device="cpu"))
    assert torch.is_grad_enabled() and not _torch_private.is_fake(torch.ones(2))


def test_only_fakes_uses_and_does_not_add_symbols():
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    with _torch_private.only_fakes(shape_env):
        sizes = torch.tensor([1, 0, 1]).nonzero().shape
    assert isinstance(sizes[0], torch.SymInt) and sizes[0].node.shape_env is shape_env
    assert not shape_env.guards and not shape_env.pending_fresh_unbacked_symbols


def test_dispatch_mode_sees_aten_calls_below_autograd():
    class Names(_torch_private.TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        torch.matmul(torch.ones(2, 2), torch.ones(2, 2))
    assert "aten.mm.default" in Names.seen


def test_storage_addresses_tell_shared_memory():
    x = torch.randn(4, 4)
    assert _torch_private.storage_address(x) == _torch_private.storage_address(x.t()[1:])
    assert _torch_private.storage_address(x) != _torch_private.storage_address(x.clone())
    with _torch_private.only_fakes(None):
        fake = torch.ones(4, 4)
        assert _torch_private.storage_address(fake) == _torch_private.storage_address(fake.view(16))
        assert _torch_private.storage_address(fake) != _torch_private.storage_address(fake + 1)
    assert _torch_private.storage_address_or_none(x.to_sparse()) is None


def test_is_wrapper_subclass_knows_dtensor_like_tensors():
    from torch.testing._internal.two_tensor import TwoTensor

    assert _torch_private.is_wrapper_subclass(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not _torch_private.is_wrapper_subclass(torch.nn.Parameter(torch.ones(2)))


def test_makes_unbacked_size():
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    with _torch_private.only_fakes(shape_env):
        x = torch.ones(3)
        rows = x.nonzero()
    assert _torch_private.makes_unbacked_size(rows, [x])
    assert not _torch_private.makes_unbacked_size(rows, [x, rows])
    assert not _torch_private.makes_unbacked_size(x, [])


def test_mode_switches_are_what_dynamo_emits():
    seen = []

    def function(x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            return x + 1

    def backend(gm, inputs):
        seen.extend(node.target for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(torch.ones(2))
    names = ("set_grad_enabled", "enter_autocast", "exit_autocast", "enter_inference_mode", "exit_inference_mode")
    assert {getattr(_torch_private, name) for name in names} <= set(seen)


def test_autocast_state():
    assert _torch_private.autocast_state() == ()
    with torch.autocast("cpu", torch.bfloat16):
        assert _torch_private.autocast_state() == (("cpu", torch.bfloat16),)


def test_is_generated_function():
    assert _torch_private.is_generated_function(torch.where)
    assert not _torch_private.is_generated_function(torch.compile)
    assert not _torch_private.is_generated_function(torch.nn.functional.dropout)


def test_trace_before_dispatch_keeps_composites_whole():
    with _torch_private.only_fakes(None):
        x = torch.ones(1, 1, 2, 4)
    traced = _torch_private.trace_before_dispatch(
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, torch.nn.functional.dropout(x, 0.5)), [x]
    )
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.dropout.default, torch.ops.aten.scaled_dot_product_attention.default]


def test_transformer_encoder_layer_fwd_is_what_the_fast_path_calls():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    seen = []

    def backend(gm, inputs):
        seen.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    with torch.no_grad():
        torch.compile(lambda x: layer(x), backend=backend)(torch.randn(1, 3, 8))
    assert _torch_private.transformer_encoder_layer_fwd in seen
