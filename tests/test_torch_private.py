"""Each private PyTorch name we use still does what we rely on."""

import sympy
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


def test_cpu_flash_attention_gives_out_and_lse_and_its_backward_uses_them():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(2, 1, 1, 5)
    out, lse = _torch_private.cpu_flash_attention(q, k, v, 0.0, True, attn_mask=mask, scale=0.3)
    # Causal and mask together are a conjunction, top-left aligned: F.scaled_dot_product_attention forbids it.
    scores = (q @ k.mT * 0.3 + mask).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    want = scores.softmax(-1) @ v
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    got = _torch_private.cpu_flash_attention_backward(
        grad, q, k, v, out.detach(), lse.detach(), 0.0, True, attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(got, torch.autograd.grad(want, (q, k, v), grad))


def test_cpu_flash_attention_gives_an_empty_row_zero_and_lse_zero():
    q = torch.randn(1, 1, 3, 8)
    mask = torch.zeros(1, 1, 3, 1)
    mask[:, :, 1] = -torch.inf
    out, lse = _torch_private.cpu_flash_attention(q, q, q, 0.0, False, attn_mask=mask.expand(1, 1, 3, 3), scale=0.3)
    assert bool((out[:, :, 1] == 0).all()) and float(lse[0, 0, 1]) == 0.0


def test_below_autograd_and_views_tracks_neither():
    x = torch.ones(2, 2, requires_grad=True)
    with _torch_private.below_autograd_and_views():
        y = (x * 2).view(4)
    assert not y.requires_grad and not y._is_view()
    with _torch_private.below_autograd():
        assert not (x * 2).requires_grad


def test_keysets_tell_a_plain_call_from_one_under_a_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    library = torch.library.Library("rocm_attn_test_keys", "DEF")
    library.define("probe(Tensor x) -> Tensor")
    seen = []

    def kernel(keyset, x):
        seen.append(_torch_private.bits_below_autograd(keyset))
        return x.detach().clone()

    library.impl("probe", kernel, "Autograd", with_keyset=True)
    probe = torch.ops.rocm_attn_test_keys.probe

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x = torch.ones(1)
    probe(x)
    with Mode():
        probe(x)
    torch.func.grad(lambda y: probe(y).sum() + y.sum())(x)
    cpu = _torch_private.keyset_bits("CPU")
    assert seen[0] == cpu
    assert len(seen) == 3
    assert cpu not in seen[1:]
    library._destroy()


def test_forward_mode_tangents_are_seen():
    import torch.autograd.forward_ad as forward_ad

    x = torch.ones(2)
    assert not _torch_private.in_forward_ad()
    with forward_ad.dual_level():
        assert _torch_private.in_forward_ad()
        dual = forward_ad.make_dual(x, x)
        assert _torch_private.any_tangent([None, 1.0, x, dual])
        assert not _torch_private.any_tangent([None, 1.0, x])
    seen = []
    torch.func.jvp(lambda y: (seen.append(_torch_private.any_tangent([y])), y)[1], (x,), (x,))
    assert seen == [True]


def test_any_requires_grad_and_all_levels_enabled():
    x = torch.ones(2, requires_grad=True)
    assert _torch_private.any_requires_grad(None, torch.ones(2), x)
    assert not _torch_private.any_requires_grad(None, torch.ones(2), x.detach())
    with torch.no_grad(), _torch_private.all_levels_enabled():
        assert torch.is_grad_enabled()


def test_single_level_functions_work_under_functorch():
    assert _torch_private.SINGLE_LEVEL_AUTOGRAD

    class Double(_torch_private.SingleLevelFunction):
        @staticmethod
        def forward(x):
            return x.detach() * 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad * 3  # not the derivative, so that it is seen to run

    x = torch.ones(2, requires_grad=True)
    with _torch_private.single_level_functions_allowed():
        Double.apply(x).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_exclude_keys_skips_autocast():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with _torch_private.exclude_keys(_torch_private.keyset("AutocastCPU")):
            assert (x @ x).dtype == torch.float32


def test_softmax_backward_is_the_formula():
    grad, weights = torch.randn(3, 5), torch.rand(3, 5)  # weights need not sum to 1
    want = weights * (grad - (weights * grad).sum(-1, keepdim=True))
    torch.testing.assert_close(_torch_private.softmax_backward(grad, weights, -1, torch.float32), want)


# --- Compiling (pipeline.py, lower/) ---


def test_what_the_pipeline_needs_during_a_compilation():
    """Names, the shape environment, specialisation and both lowerings, inside a real Dynamo compilation."""
    seen = {}

    def backend(graph_module, example_inputs):
        seen["id"] = _torch_private.compile_id()
        shape_env = _torch_private.current_shape_env()
        size = next(
            node.meta["example_value"].shape[0]
            for node in graph_module.graph.nodes
            if isinstance(node.meta.get("example_value"), torch.Tensor)
        )
        seen["symbolic"] = not isinstance(size, int)
        seen["size"] = _torch_private.specialize(size.node.expr, shape_env)
        seen["unknown"] = _torch_private.specialize(sympy.Symbol("(s52//6)", integer=True), shape_env)
        seen["log"] = str(_torch_private.log_graph("a_name_depyf_would_use", graph_module))
        return seen["lower"](graph_module, example_inputs)

    def inductor(graph_module, example_inputs):
        return _torch_private.inductor_compile(graph_module, example_inputs, None, {})

    x = torch.arange(5.0)
    for lower in (_torch_private.aot_eager_compile, inductor):
        seen["lower"] = lower
        torch._dynamo.reset()
        assert torch.equal(torch.compile(lambda t: t + 1, backend=backend, dynamic=True)(x), x + 1)
        assert seen["symbolic"]
        assert (seen["size"], seen["unknown"]) == (5, None)
        assert "a_name_depyf_would_use" in seen["log"]
        assert seen["id"][0].isdigit()
    assert _torch_private.compile_id() == "?"
    assert _torch_private.current_shape_env() is None


def test_a_specialised_size_is_guarded():
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        size = next(
            node.meta["example_value"].shape[0]
            for node in graph_module.graph.nodes
            if isinstance(node.meta.get("example_value"), torch.Tensor)
        )
        if not isinstance(size, int):
            _torch_private.specialize(size.node.expr, _torch_private.current_shape_env())
        return graph_module.forward

    f = torch.compile(lambda t: t * 2, backend=backend, dynamic=True)
    for length in (5, 5, 6):
        f(torch.ones(length))
    assert len(graphs) == 2


def test_is_restart_knows_that_a_dynamic_float_was_specialised():
    given_up = []

    def backend(gm, inputs):
        try:
            return _torch_private.aot_eager_compile(gm, inputs)
        except Exception as error:
            given_up.append(_torch_private.is_restart(error))
            raise

    torch.compile(lambda x, s: x * s, backend=backend, dynamic=True)(torch.ones(2), 0.5)
    torch.compile(lambda x, s: torch.full_like(x, s), backend=backend, dynamic=True)(torch.ones(2), 0.5)
    assert given_up == [True]
    assert not _torch_private.is_restart(ValueError())


def test_copy_graph_can_be_compiled_in_the_place_of_the_original():
    copies = []

    def backend(gm, inputs):
        copies.append(_torch_private.copy_graph(gm.graph))
        sources = [getattr(node, "_dynamo_source", None) for node in gm.graph.nodes]
        assert any(source is not None for source in sources)
        assert [getattr(node, "_dynamo_source", None) for node in copies[0].nodes] == sources
        gm.graph = copies[0]
        return _torch_private.aot_eager_compile(gm, inputs)

    layer = torch.nn.Linear(2, 2)
    compiled = torch.compile(lambda x: layer(x) + 1, backend=backend)
    torch.testing.assert_close(compiled(torch.ones(2)), layer(torch.ones(2)) + 1)


def test_generated_code_with_and_without_running():
    compiled = torch.compile(torch.matmul, backend="inductor")
    x = torch.randn(3, 3)
    result, code = _torch_private.generated_code(compiled, x, x)
    torch.testing.assert_close(result, x @ x)
    assert "extern_kernels.mm(" in code[0]
    result, unused = _torch_private.generated_code(compiled, x, x, runs=False)
    assert result is None and "extern_kernels.mm(" in unused[0]


def test_same_if_known_does_not_guard_on_data():
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    with _torch_private.only_fakes(shape_env):
        rows = torch.ones(3).nonzero()
    assert not _torch_private.same_if_known(rows.shape, (3, 1))
    assert _torch_private.same_if_known((3, 1), (3, 1))
    assert not _torch_private.same_if_known((3, 2), (3, 1))


def test_hint_of_a_size_adds_no_guard():
    import pytest

    sizes, guards = [], []

    def backend(graph_module, inputs):
        shape_env = _torch_private.current_shape_env()
        before = len(shape_env.guards)
        sizes.extend(_torch_private.hint(x) for x in inputs if isinstance(x, torch.SymInt))
        guards.append(len(shape_env.guards) - before)
        return graph_module.forward

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.ones(5, 7))
    assert sorted(sizes) == [5, 7] and guards == [0]
    assert _torch_private.hint(3) == 3 and _torch_private.hint(None) is None
    with _torch_private.only_fakes(torch.fx.experimental.symbolic_shapes.ShapeEnv()):
        rows = torch.ones(3).nonzero()
    with pytest.raises(ValueError, match="depends on data"):
        _torch_private.hint(rows.shape[0])


def test_trace_rule_replaces_a_call_in_aotautograds_trace_and_nowhere_else():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    from rocm_attn_compile.testing import count_calls

    library = torch.library.Library("rocm_attn_test_rule", "FRAGMENT")
    library.define("double(Tensor x, bool inline) -> Tensor")
    library.impl("double", lambda x, inline: x * 2, "CPU")
    library.impl("double", lambda x, inline: torch.empty_like(x), "Meta")
    op = torch.ops.rocm_attn_test_rule.double.default
    seen = []

    def find(args, kwargs):
        seen.append((_torch_private.is_traced(args[0]), _torch_private.is_recomputed()))
        return (lambda: args[0] + args[0]) if args[1] else None

    _torch_private.register_trace_rule(library, op, find)
    graphs = []

    def keep(graph_module, _):
        graphs.append(count_calls(graph_module))
        return make_boxed_func(graph_module.forward)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(lambda x: op(x, True), x, use_reentrant=False)

    x = torch.randn(3, requires_grad=True)
    torch.testing.assert_close(op(x.detach(), True), x.detach() * 2)
    assert not seen and not _torch_private.is_traced(x)
    for function, inlined in ((lambda x: op(x, True), 1), (lambda x: op(x, False), 0), (checkpointed, 1)):
        seen.clear()
        graphs.clear()
        with torch.set_grad_enabled(function is checkpointed):
            compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
            torch.testing.assert_close(compiled(x), x * 2)
        assert graphs[0]["aten.add"] == inlined and graphs[0]["rocm_attn_test_rule.double"] == 1 - inlined
        assert seen[-1] == (True, function is checkpointed)  # after a first pass that only looks for aliases


def test_uses_cuda_graphs_while_inductor_compiles_for_them():
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def compiler(graph_module, _inputs):
        seen.append(_torch_private.uses_cuda_graphs())
        return graph_module.forward

    x = torch.ones(3)
    for options in ({}, {"triton.cudagraphs": True}):
        with torch._inductor.config.patch(options):
            torch._dynamo.reset()
            torch.compile(lambda t: t + 1, backend=aot_autograd(fw_compiler=compiler))(x)
    assert seen == [False, True]
    wrapper = torch._TorchCompileInductorWrapper("reduce-overhead", None, None)
    assert wrapper.config["triton.cudagraphs"] is True  # what the mode stands for, by which compile_fx patches it


def test_triton_writes_is_tested_with_our_kernels():
    """See tests/kernels/test_traced.py; here only that a kernel PyTorch cannot read counts as writing all tensors."""
    written = _torch_private.triton_writes(object(), {"x": torch.empty(2), "n": 3}, {})
    assert written == {"x"}


def test_triton_source_has_what_the_kernel_uses():
    """See tests/kernels/test_traced.py, where all our kernels are quoted."""
    from rocm_attn_compile.kernels.triton.combine import attention_combine_kernel

    source = _torch_private.triton_source(attention_combine_kernel)
    assert "def attention_combine_kernel(" in source
    assert "def finish_rows(" in source
    assert "LOG2E = tl.constexpr(1.44" in source


def test_record_triton_keeps_descriptors_block_shapes_in_the_graph():
    import triton

    @triton.jit
    def kernel(x, y, n):
        pass

    x, y = torch.empty(4, 16), torch.empty(8)

    def traced(x, y):
        _torch_private.record_triton(kernel, 7, {"x": x, "y": y, "n": 5}, {"x": (2, 16)})
        return y + 1

    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(traced, tracing_mode="fake")(x, y).graph
    (call,) = [node for node in graph.nodes if node.target is triton_kernel_wrapper_mutation]
    assert call.kwargs["grid"] == [(7, 1, 1)]
    assert call.kwargs["tma_descriptor_metadata"] == {"x": ("stable", ([2, 16],))}
    assert set(call.kwargs["kwargs"]) >= {"x", "y"}
