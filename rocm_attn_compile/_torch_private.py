"""The only door to PyTorch's private names: one thin function or alias each, so that a new torch breaks one file.

Every entry has a test in tests/test_torch_private.py that notices when it changes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.fx

# --- Inductor's options (options.py) ---


def inductor_option_names() -> list[str]:
    """Names that `torch.compile(backend="inductor", options=...)` accepts, such as "triton.cudagraphs"."""
    from torch._inductor import list_options

    return list_options()


def check_inductor_options(options: dict[str, Any]) -> None:
    """Validate names and types of Inductor options exactly as torch does.

    Raises:
        RuntimeError: Torch's own, for an unknown name or a value of the wrong type.
    """
    torch._TorchCompileInductorWrapper(None, options, None)


# --- Reports and explain (report.py, explain.py) ---


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Write a text artifact to `TORCH_TRACE` logs, where tlparse shows it; does nothing when tracing is off."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)


def uncompiled(model: Callable) -> Callable:
    """The function or module under `torch.compile` wrappers; `model` itself when it is not compiled."""
    from torch._dynamo.eval_frame import OptimizedModule, innermost_fn

    if isinstance(model, OptimizedModule):
        return model._orig_mod
    return innermost_fn(model)


@contextmanager
def module_compile_suspended(model: Callable) -> Iterator[None]:
    """Context in which a module that was given `module.compile()` calls its own `forward` again.

    `torch.compile(module)` would otherwise run that compilation, not the one asked for. Submodules need nothing:
    Dynamo inlines them either way.
    """
    saved = getattr(model, "_compiled_call_impl", None)
    if saved is None:
        yield
        return
    model._compiled_call_impl = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        model._compiled_call_impl = saved  # type: ignore[attr-defined]


def recompile_limits_lifted() -> AbstractContextManager:
    """Context in which Dynamo compiles however many versions of a function exist already."""
    import torch._dynamo

    unlimited = 1 << 30
    return torch._dynamo.config.patch(recompile_limit=unlimited, accumulated_recompile_limit=unlimited)


def add_guard(is_valid: Callable[[], bool], text: str) -> bool:
    """Make Dynamo compile again, the next time the graph being compiled is called, once `is_valid()` is False.

    Args:
        is_valid: Called before every run of the compiled graph, so it must be fast.
        text: What is guarded; `TORCH_LOGS=recompiles` prints it.

    Returns:
        False outside a compilation by Dynamo, where there is nothing to guard.
    """
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard, TracingContext

    context = TracingContext.try_get()
    if context is None:
        return False

    def create(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_lambda_guard(lambda _: is_valid(), [text], None)

    context.guards_context.dynamo_guards.add(Guard(GlobalStateSource(), create))
    return True


def graph_break_reason(graph_module: torch.fx.GraphModule) -> str | None:
    """Why Dynamo ended this graph early, or None if it ended by returning."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return reason.reason if reason is not None and reason.graph_break else None


# --- Memory of a call (testing/memory.py) ---


def cpu_allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes of each CPU allocation (positive) and release (negative) in a profile, in order of time."""
    assert profile.profiler is not None, "the profile has not run"
    results: Any = profile.profiler.kineto_results
    events = [
        event
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch._C._autograd.DeviceType.CPU
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


# --- What Inductor makes of a function (tests) ---


def generated_code(function: Callable, *args: Any, runs: bool = True) -> tuple[Any, list[str]]:
    """The result of calling a compiled function for the first time, and the code that Inductor wrote for it.

    Args:
        function: From `torch.compile`.
        args: Its arguments.
        runs: If False the code is neither compiled nor run, which saves the C++ compiler's time; the result is None.
    """
    from torch._inductor.utils import fresh_cache, get_code, run_and_get_code

    with fresh_cache():
        if runs:
            return run_and_get_code(function, *args)
        return None, get_code(function, *args)


# --- Compiling (pipeline.py, lower/) ---


def inductor_compile(
    graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any]
) -> Callable:
    """Compile as `torch.compile(backend="inductor", mode=..., options=...)` does; torch expands modes and options."""
    # torch refuses both at once, and an empty dict counts as given
    wrapper = torch._TorchCompileInductorWrapper(mode, options or None, None)
    return wrapper(graph_module, example_inputs)


def aot_eager_compile(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
    """AOTAutograd without Inductor: the functionalised graphs run op by op."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(graph_module, list(example_inputs))


def copy_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy of a Dynamo graph with what Dynamo keeps on its nodes, beside `meta`, and needs when it lowers them."""
    result = copy.deepcopy(graph)
    for node, copied in zip(graph.nodes, result.nodes, strict=True):
        for name in vars(node).keys() - vars(copied).keys():
            setattr(copied, name, getattr(node, name))
    return result


def is_restart(error: BaseException) -> bool:
    """True for what is raised while a graph is compiled to make Dynamo give it up and trace the function again."""
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(error, RestartAnalysis)


def current_shape_env() -> Any:
    """The ShapeEnv of the graph Dynamo is compiling now; None outside a compilation."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return None if context is None or context.fake_mode is None else context.fake_mode.shape_env


def log_graph(name: str, graph_module: torch.fx.GraphModule) -> Any:
    """The graph as lazily formatted text; depyf hooks this very call and writes `<name>` to its folder."""
    from torch._dynamo.utils import lazy_format_graph_code

    return lazy_format_graph_code(name, graph_module)


_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n(?:\s*(?P<code>\S.*))?', re.MULTILINE)


def source_of(stack_trace: str | None) -> tuple[str, str]:
    """`("file:line", "the code")` of the user's model, from the `stack_trace` that Dynamo puts on a node.

    The innermost frame outside PyTorch itself: for `nn.MultiheadAttention` the line that calls it. ("unknown", "")
    where there is no trace.
    """
    frames = [match.groupdict() for match in _FRAME.finditer(stack_trace or "")]
    if not frames:
        return "unknown", ""
    own = [frame for frame in frames if not re.search(r"[/\\]torch[/\\]", frame["file"])]
    frame = (own or frames)[-1]
    return f"{frame['file']}:{frame['line']}", (frame["code"] or "").strip()


def compile_id() -> str:
    """Dynamo's name of the compilation going on, such as "0/0"; "?" outside one."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return "?" if current is None else str(current)


# --- The op on CPU tensors (ops/cpu.py, ops/cpu_backward.py) ---

# ATen's fused CPU attention: (q, k, v, dropout_p, is_causal, *, attn_mask, scale) -> (out, logsumexp). The binding in
# the torch namespace costs 2 us less per call than torch.ops.aten.
cpu_flash_attention = torch._scaled_dot_product_flash_attention_for_cpu

# Its backward: (grad, q, k, v, out, logsumexp, dropout_p, is_causal, *, attn_mask, scale) -> (dq, dk, dv).
cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Context: neither autograd nor view tracking sees what runs inside, as inside any C++ kernel.
below_autograd_and_views = torch._C._AutoDispatchBelowADInplaceOrView


# --- What a trace sees of the op (ops/inline.py) ---


def register_trace_rule(library: Any, op: Any, find: Callable[[tuple, dict], Callable[[], Any] | None]) -> None:
    """Let AOTAutograd record something else than a call of `op` in the graph that it traces.

    Args:
        library: The `torch.library.Library` that defined the op.
        op: The overload.
        find: From the arguments of a call to what is traced instead, or to None, which records the call. What is traced
            may return NotImplemented, with the same effect.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    plain = (torch.Tensor, FakeTensor, FunctionalTensor)

    def rule(mode: Any, _op: Any, types: Sequence[type], args: tuple, kwargs: dict | None) -> Any:
        # Any other subclass, such as DTensor, has to see the op itself.
        body = find(args, kwargs or {}) if all(kind in plain for kind in types) else None
        if body is not None:
            with mode:
                result = body()
            if result is not NotImplemented:
                return result
        return mode.__torch_dispatch__(op, types, args, kwargs)

    library._register_torch_dispatch_rule(op._schema.name.partition("::")[2], FunctionalTensorMode, rule)


def is_traced(tensor: torch.Tensor) -> bool:
    """True for a tensor of AOTAutograd's trace, whose values are not known."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, FunctionalTensor)


def uses_cuda_graphs() -> bool:
    """Whether Inductor, as it is configured now, captures what it compiles in CUDA graphs."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def triton_writes(kernel: Any, arguments: dict[str, Any], blocks: dict[str, tuple[int, ...]]) -> set[str]:
    """Names of the tensors that a call of a Triton kernel writes, as PyTorch finds out when it traces one.

    Where it cannot find out, it logs why, takes all tensors for written, and may then compile a wrong program.

    Args:
        kernel: A `triton.jit` function or an autotuner.
        arguments: By name, without what the autotuner adds.
        blocks: The block shape of each tensor that is read through a tensor descriptor.
    """
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

    with without_dispatch_modes():
        tensors = {k: torch.empty(2, dtype=v.dtype) for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        constants = {k: v for k, v in arguments.items() if k not in tensors}
        places = kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args(constants)
        return set(get_mutated_tensors(*places, tensors, _descriptors(blocks)))


def record_triton(kernel: Any, grid: Any, arguments: dict[str, Any], blocks: dict[str, tuple[int, ...]]) -> None:
    """Record `kernel[(grid,)](**arguments)` in the graph being traced, as `torch.library.wrap_triton` does.

    That does not take tensor descriptors, though Inductor does: a tensor named in `blocks` reaches the kernel as a
    descriptor of its sizes and strides, with that block shape.
    """
    if not blocks:
        torch.library.wrap_triton(kernel)[(grid,)](**arguments)
        return
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    in_graph = {k: v for k, v in arguments.items() if isinstance(v, torch.fx.node.base_types)}
    others = {k: v for k, v in arguments.items() if k not in in_graph}
    triton_kernel_wrapper_mutation(
        kernel_idx=kernel_side_table.add_kernel(kernel),
        constant_args_idx=kernel_side_table.add_constant_args(others),
        grid=[(grid, 1, 1)],
        tma_descriptor_metadata=_descriptors(blocks),
        kwargs=in_graph,
    )


def triton_source(kernel: Any) -> str:
    """A `triton.jit` function, and all that it uses, as Inductor quotes it in its program."""
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as source_of

    return source_of(kernel)


def _descriptors(blocks: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {name: ("stable", (list(block),)) for name, block in blocks.items()}


def is_recomputed() -> bool:
    """True while AOTAutograd traces a region of activation checkpointing."""
    from torch.fx import traceback

    return "recompute" in traceback.current_meta


# --- Arguments of ATen calls (recognize/mask) ---


def schema_arguments(op: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    """`(name, default)` of each argument of an overload, in order; None where there is no default."""
    return tuple((argument.name, argument.default_value) for argument in op._schema.arguments)


# --- Capture: fakes and modes (capture/) ---

# Base class of a mode that sees every ATen call.
TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode


def only_fakes(shape_env: Any) -> ExitStack:
    """Context in which every tensor made is a throw-away fake with symbols of `shape_env`; records no gradient.

    Ambient TorchFunctionModes and inference mode are off inside. The Python dispatcher is on, as when Dynamo computed
    its examples: without it some ops guard on symbolic sizes. Unbacked symbols made inside are forgotten.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensorMode

    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch._C.DisableTorchFunction())
    if shape_env is not None:
        stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
    stack.enter_context(enable_python_dispatcher())
    stack.enter_context(FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True))
    return stack


def without_dispatch_modes() -> AbstractContextManager:
    """Context in which tensors are computed for real although a fake mode is active."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def is_fake(tensor: torch.Tensor) -> bool:
    """True for a fake tensor."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def hint(number: Any) -> Any:
    """The value a symbolic number has in the call that is being compiled, without a guard; a plain one as it is.

    Raises:
        ValueError: There is none: it depends on data.
    """
    if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return number
    value = number.node.hint
    if value is None:
        raise ValueError(f"{number} depends on data")
    return value


def is_wrapper_subclass(tensor: torch.Tensor) -> bool:
    """True for DTensor and its like, whose calls are not plain ATen calls."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def storage_address(tensor: torch.Tensor) -> int:
    """A number that two tensors have in common exactly if they share a storage."""
    return tensor.untyped_storage()._cdata


def storage_address_or_none(tensor: torch.Tensor) -> int | None:
    """As `storage_address`; None for a tensor without storage (sparse, wrapper subclasses)."""
    try:
        return storage_address(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def makes_unbacked_size(result: Any, operands: Any) -> bool:
    """True if the result's sizes have a data-dependent symbol that the operands do not have."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def symbols(tree: Any) -> set:
        tensors = [
            leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, (torch.Tensor, torch.SymInt))
        ]
        sizes = [size for leaf in tensors for size in (leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,))]
        return {symbol for size in sizes if not isinstance(size, int) for symbol in free_unbacked_symbols(size)}

    new = symbols(result)
    return bool(new and new - symbols(operands))


def same_if_known(left: Sequence[int], right: Sequence[int]) -> bool:
    """`left == right`; False where that depends on data, as with the length of `k[:, :n.item()]` while compiling."""
    try:
        return left == right
    except RuntimeError as error:
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        if isinstance(error, GuardOnDataDependentSymNode):
            return False
        raise


# Targets of the nodes by which Dynamo switches modes.
set_grad_enabled = torch._C._set_grad_enabled
enter_inference_mode = torch.autograd.grad_mode._enter_inference_mode
exit_inference_mode = torch.autograd.grad_mode._exit_inference_mode
enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices for which autocast is on, with its dtype."""
    devices = ("cpu", "cuda", "xpu", "mps")
    return tuple((device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device))


# --- Autograd of the ops (ops/autograd.py) ---

SingleLevelFunction: Any
single_level_functions_allowed: Any
try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    # Like torch.autograd.Function, but for one level of torch.func, inside that context.
    SingleLevelFunction, single_level_functions_allowed = _SingleLevelFunction, enable_single_level_autograd_function
    SINGLE_LEVEL_AUTOGRAD = True
    """True if this torch has what ops/autograd.py needs; else it falls back to register_autograd."""
except ImportError:  # a later torch
    SingleLevelFunction, single_level_functions_allowed = torch.autograd.Function, nullcontext
    SINGLE_LEVEL_AUTOGRAD = False

# Context: the dispatcher goes below the Autograd keys.
below_autograd = torch._C._AutoDispatchBelowAutograd

# (*tensors) -> whether any argument is a tensor that requires grad.
any_requires_grad = torch._C._any_requires_grad


def keyset(key: str) -> Any:
    """The dispatch keyset of one key, such as "CPU"."""
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))


def keyset_bits(key: str) -> int:
    """The dispatch keyset of one key as an int that can be compared."""
    return keyset(key).raw_repr()


def bits_below_autograd(keyset: Any) -> int:
    """The keys of a call that are still to come after Autograd, as an int like keyset_bits gives."""
    return (keyset & torch._C._after_autograd_keyset).raw_repr()


def in_forward_ad() -> bool:
    """True inside `torch.autograd.forward_ad.dual_level`, as entered by eager code."""
    return torch.autograd.forward_ad._current_level >= 0


def any_tangent(tensors: Iterable[Any]) -> bool:
    """True if any tensor carries a forward-mode tangent, also while compiling, where Python does not know the level."""
    if not torch._C._is_fwd_grad_enabled():
        return False
    return any(isinstance(t, torch.Tensor) and torch._VF._unpack_dual(t, level=0)[1] is not None for t in tensors)


@contextmanager
def all_levels_enabled() -> Iterator[None]:
    """Gradients and forward-mode gradients on, for the levels of torch.func outside the current one."""
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield


# Context: the dispatcher skips the keys of a keyset (ops/autocast.py).
exclude_keys = torch._C._ExcludeDispatchKeyGuard


def trace_before_dispatch(function: Callable, examples: Sequence[Any]) -> torch.fx.GraphModule:
    """Trace a function on fakes into ATen calls as they are before autograd and autocast act on them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*examples)


# The call that nn.TransformerEncoderLayer makes in inference instead of calling its parts.
transformer_encoder_layer_fwd = torch._transformer_encoder_layer_fwd


def is_generated_function(target: Any) -> bool:
    """True for functions of `torch` that are generated from ATen's list of ops, such as `torch.where`."""
    return getattr(torch._C._VariableFunctions, getattr(target, "__name__", ""), None) is target


def specialize(size: Any, shape_env: Any) -> int | None:
    """The number a symbolic size has now; Dynamo recompiles when it changes (a guard, as `int(symint)` installs).

    None for a symbol such as `(s52//6)`, which PyTorch makes for a whole fraction of another and then does not know.
    """
    if any(symbol not in shape_env.var_to_range for symbol in size.free_symbols):
        return None
    return int(shape_env.evaluate_expr(size))


# The softmax's derivative in one pass: (grad, weights, dim, dtype) -> weights * (grad - sum(weights * grad)).
softmax_backward = torch.ops.aten._softmax_backward_data.default
