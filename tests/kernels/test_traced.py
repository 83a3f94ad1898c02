"""What PyTorch reads out of our Triton kernels when Inductor is to launch them: exactly which tensors they write.

No GPU is needed for that, only a driver that says what the target is. Without the right answer Inductor would compile a
wrong program, so a call that is misread must not be traced.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch
import triton
from symbolic_launches import Symbols
from triton.backends.compiler import GPUTarget

from rocm_attn_compile import _torch_private
from rocm_attn_compile.kernels import triton as kernels
from rocm_attn_compile.kernels.triton import aot_launches, aot_mla, forward_launch, traced
from rocm_attn_compile.kernels.triton.launch import EMPTY_ROWS, base_of, descriptor
from rocm_attn_compile.ops.kv_cache import CACHE_TENSORS
from rocm_attn_compile.ops.schemas import OPTIONAL_TENSORS

TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "sm90": GPUTarget("cuda", 90, 32),
}
WRITTEN = {
    "attention_forward_kernel": {"out", "lse"},
    "attention_combine_kernel": {"out", "lse"},
    "backward_rows_kernel": {"shift", "delta"},
    "mask_ranges_kernel": {"ranges"},
    "values_sum_kernel": {"sums"},
    "empty_rows_kernel": {"out"},
    "backward_dkdv_kernel": {"grad_k", "grad_v"},
    "backward_dq_kernel": {"grad_q"},
    "backward_bias_kernel": {"grad_bias"},
    "attention_weights_kernel": {"weights"},
}
IMPORTED = {"triton", "tl", "libdevice"}
"""Inductor's programs import these, in torch 2.11 as in 2.13."""
EVERYTHING = {
    "attn_bias": True, "attn_mask": True, "key_mask": True, "kv_start": True, "kv_end": True,
    "soft_cap": 30.0, "dropout_p": 0.1, "band_lower": -9, "empty_rows": "mean_added",
}  # fmt: skip


def shipped_kernels():
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    return [kernel for _, kernel in sorted(found.items()) if type(kernel) is triton.JITFunction]


@pytest.mark.parametrize("kernel", shipped_kernels(), ids=lambda kernel: kernel.__name__)
def test_inductor_can_quote_its_source(kernel):
    """Inductor writes it between three quotes: what escapes there, such as a newline in a string, must not be in it."""
    source = _torch_private.triton_source(kernel)
    quoted = ast.literal_eval(f"'''{source}'''")
    assert quoted == source
    module = compile(quoted, "<quoted>", "exec", ast.PyCF_ONLY_AST)
    names = {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    assert kernel.__name__ in names
    names |= {t.id for node in module.body if isinstance(node, ast.Assign) for t in node.targets}
    assert _globals(compile(module, "<quoted>", "exec")) <= names | IMPORTED | set(dir(builtins))


def _globals(code):
    """Global names that the functions of a module read."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return own.union(*(_globals(inner) for inner in code.co_consts if inspect.iscode(inner)))


@pytest.fixture
def launches_for(monkeypatch):
    def make(arch, head_dim=64, q_len=128, kv_len=128, **features):
        driver = SimpleNamespace(get_current_target=lambda: TARGETS[arch], get_current_device=lambda: 0)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
        return aot_launches.launches(arch, torch.bfloat16, head_dim, q_len=q_len, kv_len=kv_len, **features).values()

    return make


def read(launch):
    kernel = traced._with_options(launch.kernel, tuple(sorted(launch.options.items())))
    bases = {k: base_of(v) for k, v in launch.arguments.items()}
    return _torch_private.triton_writes(kernel, bases, traced._blocks(launch))


@pytest.mark.parametrize("arch", TARGETS)
def test_training(launches_for, arch):
    found = {launch.kernel.__name__: read(launch) for launch in launches_for(arch, weights=True)}
    assert found == {name: WRITTEN[name] for name in found} and len(found) == 5


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
def test_long_calls_on_hopper_read_through_descriptors(launches_for, head_dim, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton_tensor_descriptor_host_tma", lambda: True)  # it asks the GPU
    launches = launches_for("sm90", head_dim=head_dim, q_len=1024, kv_len=1024)
    described = {launch.kernel.__name__: set(traced._blocks(launch)) for launch in launches}
    rest = {"q_rest", "k_rest"} if head_dim in (96, 192) else set()
    assert described["attention_forward_kernel"] == {"q", "k", "v"} | rest
    assert described["backward_dkdv_kernel"] == {"q", "k", "v", "grad_out"} | rest
    for launch in launches:
        # Large heads have a launch for dk and one for dv.
        unwanted = {f"grad_{x}" for x in "kv" if not launch.arguments.get(f"WANT_D{x.upper()}", True)}
        assert read(launch) == WRITTEN[launch.kernel.__name__] - unwanted


def test_only_a_descriptor_with_its_tensors_strides_is_traced():
    packed = torch.empty(1, 8, 3, 3, 64, dtype=torch.bfloat16)
    usual = packed[:, :, 1].transpose(1, 2)
    assert traced._is_plain(descriptor(usual, 8, 64)) and base_of(descriptor(usual, 8, 64)) is usual
    odd = usual.as_strided(usual.shape, (7, *usual.stride()[1:]))
    assert descriptor(odd, 8, 64).strides == (8, *usual.stride()[1:]) and not traced._is_plain(descriptor(odd, 8, 64))


def test_a_kernel_in_gluon_is_not_traced(launches_for):
    sizes = {"batch": 1, "num_heads": 32, "num_kv_heads": 32, "q_len": 8192, "kv_len": 8192, "backward": False}
    launches = list(launches_for("sm90", 192, v_head_dim=128, **sizes))
    assert [launch.kernel.__name__ for launch in launches] == ["attention_forward_hopper_kernel"]
    with pytest.raises(traced.StaysOpaque, match="Gluon"):
        traced.trace(launches, {}, SimpleNamespace())


def test_every_feature(launches_for):
    found = {launch.kernel.__name__: read(launch) for launch in launches_for("gfx942", weights=True, **EVERYTHING)}
    extra = {"backward_rows_kernel": {"correction", "any_empty"}}
    assert found == {name: WRITTEN[name] | extra.get(name, set()) for name in found} and len(found) == 7


def test_long_calls_with_padding_read_a_table_of_ranges(launches_for):
    launches = launches_for("gfx942", q_len=4096, kv_len=4096, key_mask=True)
    found = {launch.kernel.__name__: read(launch) for launch in launches}
    assert found == {name: WRITTEN[name] for name in found} and "mask_ranges_kernel" in found
    for launch in launches:
        if launch.kernel.__name__ in ("attention_forward_kernel", "backward_dkdv_kernel", "backward_dq_kernel"):
            assert launch.arguments["RANGED"] and launch.arguments["ranges"] is not None


def test_means_of_rows_without_keys_are_left_to_kernels_of_their_own_in_long_calls(launches_for):
    def names(**fields):
        launches = list(launches_for("gfx942", **{"backward": False, "kv_start": True, "empty_rows": "mean", **fields}))
        mains = [launch for launch in launches if launch.kernel.__name__ == "attention_forward_kernel"]
        found = {launch.kernel.__name__: read(launch) for launch in launches}
        assert found == {name: WRITTEN[name] for name in found}
        return list(found), [main.arguments["EMPTY_ROWS"] for main in mains]

    long = {"q_len": 4096, "kv_len": 4096}
    apart = ["attention_forward_kernel", "values_sum_kernel", "empty_rows_kernel"]
    assert names(**long) == (apart, [EMPTY_ROWS["zero"]])
    assert names(**long, empty_rows="mean_added") == (apart, [EMPTY_ROWS["zero"]])
    # Short calls; rows that have a mean in no mode but these; masks that may differ from head to head.
    assert names() == (apart[:1], [EMPTY_ROWS["mean"]])
    assert names(**long, empty_rows="nan") == (apart[:1], [EMPTY_ROWS["nan"]])
    for others in ({"attn_mask": True}, {"attn_bias": True}, {"dropout_p": 0.1}):
        assert names(**long, **others) == (apart[:1], [EMPTY_ROWS["mean"]])


def test_as_many_programs_add_up_values_as_fill_a_device(launches_for):
    def shares(batch, heads):
        sizes = {"batch": batch, "num_heads": heads, "num_kv_heads": heads, "q_len": 4096, "kv_len": 4096}
        launches = launches_for("gfx942", backward=False, key_mask=True, empty_rows="mean", **sizes)
        (found,) = (launch for launch in launches if launch.kernel.__name__ == "values_sum_kernel")
        assert found.grid == batch * heads * found.arguments["SHARES"]
        return found.arguments["SHARES"]

    assert [shares(*sizes) for sizes in ((1, 4), (1, 8), (2, 16), (3, 40), (16, 32), (40, 32))] == [64, 64, 16, 4, 1, 1]


def test_split_decode(launches_for):
    found = {
        launch.kernel.__name__: read(launch)
        for launch in launches_for("gfx942", num_splits=4, kv_end=True, backward=False, causal=False)
    }
    assert found["attention_forward_kernel"] == {"partial", "partial_stats"}
    assert found["attention_combine_kernel"] == WRITTEN["attention_combine_kernel"]


@pytest.mark.parametrize("kv_len", [4096, 8192])
def test_decode_on_hopper(launches_for, kv_len, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton_tensor_descriptor_host_tma", lambda: True)  # it asks the GPU
    sizes = {"batch": 1, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "q_len": 1, "kv_len": kv_len}
    launches = list(launches_for("sm90", backward=False, causal=False, num_splits=2, **sizes))
    assert launches[0].arguments["LATE_QUERIES"] and launches[0].arguments["TMA"] == (kv_len == 8192)
    found = {launch.kernel.__name__: read(launch) for launch in launches}
    assert found["attention_forward_kernel"] == {"partial", "partial_stats"}
    assert found["attention_combine_kernel"] == WRITTEN["attention_combine_kernel"]


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("float8", [False, True], ids=["bf16", "float8"])
def test_caches(launches_for, arch, float8):
    cache = {"page": 16, "kv_end": True, "causal": False, "backward": False, "num_splits": 2}
    if float8:
        cache.update(kv_dtype=torch.float8_e4m3fn, scale=True)
    launches = list(launches_for(arch, q_len=1, kv_len=512, **cache))
    if float8 and arch == "sm90":  # assembly, of which PyTorch says that it writes everything
        with pytest.raises(traced.StaysOpaque, match="float8"):
            traced.trace(launches, {}, SimpleNamespace())
        return
    found = {launch.kernel.__name__: read(launch) for launch in launches}
    assert found["attention_forward_kernel"] == {"partial", "partial_stats"}
    assert found["attention_combine_kernel"] == WRITTEN["attention_combine_kernel"]


@pytest.fixture
def latent_launches(monkeypatch):
    def make(arch, num_heads=16, **sizes):
        driver = SimpleNamespace(get_current_target=lambda: TARGETS[arch], get_current_device=lambda: 0)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
        # It asks the GPU.
        monkeypatch.setattr("torch.utils._triton.has_triton_tensor_descriptor_host_tma", lambda: arch == "sm90")
        return aot_mla.launches(arch, torch.bfloat16, num_heads, traced=True, **sizes).values()

    return make


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize(
    "sizes", [{}, {"batch": 1}, {"block_size": 64}, {"block_size": 16}, {"key_mask": True}], ids=str
)
def test_latent_decode(latent_launches, arch, num_heads, sizes):
    launches = list(latent_launches(arch, num_heads, num_splits=4, **sizes))
    assert all(traced._is_plain(value) for launch in launches for value in launch.arguments.values())
    found = {launch.kernel.__name__: read(launch) for launch in launches}
    written = {"mla_decode_kernel": {"partial", "partial_stats"}, "attention_combine_kernel": {"out", "lse"}}
    assert found == written
    is_described = arch == "sm90" and sizes.get("block_size") != 16
    assert bool(traced._blocks(launches[0])) == is_described


def test_latent_decode_of_one_share(latent_launches):
    (launch,) = latent_launches("gfx942", num_splits=1)
    assert read(launch) == {"out", "lse"}


@pytest.mark.parametrize("arch", TARGETS)
def test_latent_training(latent_launches, arch):
    sizes = {"q_len": 128, "kv_len": 128, "absorbed": False, "backward": True}
    found = {launch.kernel.__name__: read(launch) for launch in latent_launches(arch, **sizes)}
    extra = {"backward_dkdv_kernel": {"grad_k_rest"}, "backward_dq_kernel": {"grad_q_rest"}}
    assert found == {name: WRITTEN[name] | extra.get(name, set()) for name in found} and len(found) == 4


def test_a_kernel_that_pytorch_misreads_is_not_traced(launches_for, caplog):
    (launch,) = launches_for("gfx942", backward=False)
    kernel = traced._with_options(launch.kernel, tuple(sorted(launch.options.items())))
    given = {id(launch.arguments["q"])}
    assert traced._is_understood(kernel, launch, given, _torch_private)
    traced._understood.clear()
    assert not traced._is_understood(kernel, launch, given, SimpleNamespace(triton_writes=lambda *_: {"q", "out"}))
    assert "attention_forward_kernel is not inlined" in caplog.text
    traced._understood.clear()
    assert not traced._is_understood(kernel, launch, given, SimpleNamespace(triton_writes=lambda *_: set()))
    traced._understood.clear()


def test_without_a_driver_every_tensor_counts_as_written():
    """As on a machine without a GPU; what PyTorch logs then says so."""
    (launch,) = aot_launches.launches("gfx942", torch.bfloat16, 64, backward=False).values()
    assert {"q", "k", "v", "out", "lse"} <= read(launch)


def shapes(*sizes):
    return {name: torch.empty(size, dtype=torch.bfloat16) for name, size in zip("qkv", sizes)}


def trace_with_symbols(monkeypatch, arch, hints, actual, symbols=None, **settings):
    """What traced.attention_forward gives and records, where sizes in which `hints` and `actual` differ are symbols."""
    driver = SimpleNamespace(get_current_target=lambda: TARGETS[arch], get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    for module in (traced, forward_launch):
        monkeypatch.setattr(module, "device_arch", lambda _: (arch, 132))
    monkeypatch.setattr("torch.utils._triton.has_triton_tensor_descriptor_host_tma", lambda: arch == "sm90")
    symbols = symbols or Symbols(hints, actual)
    recorded = []
    tracer = SimpleNamespace(
        hint=_torch_private.hint,
        uses_cuda_graphs=_torch_private.uses_cuda_graphs,
        triton_writes=_torch_private.triton_writes,
        record_triton=lambda kernel, grid, arguments, blocks: recorded.append((kernel.fn, grid, arguments, blocks)),
    )
    optional = dict.fromkeys((*OPTIONAL_TENSORS, *CACHE_TENSORS))
    scalars = {"softmax_scale": 0.1, "logits_soft_cap": None, "band_lower": None, "band_upper": None, "dropout_p": 0.0}
    with symbols.mode:
        result = traced.attention_forward(
            tracer, "", **symbols.fakes, **optional, **scalars, empty_rows="zero", out_layout="bhsd", **settings
        )
    assert not symbols.env.guards
    return result, recorded


@pytest.mark.parametrize("arch", TARGETS)
def test_lengths_that_are_symbols(monkeypatch, arch):
    hints, actual = (shapes((b, 8, n, 64), (b, 2, n, 64), (b, 2, n, 64)) for b, n in ((3, 77), (2, 50)))
    (out, lse), [(kernel, grid, arguments, blocks)] = trace_with_symbols(monkeypatch, arch, hints, actual)
    assert kernel.__name__ == "attention_forward_kernel" and lse.shape == out.shape[:3]
    assert isinstance(grid, torch.SymInt) and isinstance(arguments["q_len"], torch.SymInt)
    constants = {p.name for p in kernel.params if p.is_constexpr}
    assert not any(isinstance(arguments[name], torch.SymInt) for name in constants)
    # Strides are products with whole widths, whatever the lengths.
    assert set(blocks) == ({"q", "k", "v"} if arch == "sm90" else set())


def test_numbers_of_heads_that_are_symbols_stay_a_call(monkeypatch, caplog):
    hints, actual = (shapes((2, h, 50, 64), (2, h, 50, 64), (2, h, 50, 64)) for h in (6, 4))
    with caplog.at_level("INFO"):
        assert trace_with_symbols(monkeypatch, "gfx942", hints, actual) == (NotImplemented, [])
    assert "attention_forward stays one opaque call: kernels are compiled by numbers of heads" in caplog.text


def test_lengths_that_depend_on_data_stay_a_call(monkeypatch, caplog):
    hints, actual = (shapes((2, 4, n, 64), (2, 4, n, 64), (2, 4, n, 64)) for n in (60, 50))
    symbols = Symbols(hints, actual)
    unbacked = symbols.env.create_unbacked_symint()
    with symbols.mode:
        symbols.fakes["k"] = torch.empty((2, 4, unbacked, 64), dtype=torch.bfloat16)
    with caplog.at_level("INFO"):
        assert trace_with_symbols(monkeypatch, "gfx942", hints, actual, symbols) == (NotImplemented, [])
    assert "depends on data" in caplog.text


def test_on_hopper_a_long_call_with_symbols_stays_a_call(monkeypatch, caplog):
    """So that its kernel in Gluon may take it."""
    hints, actual = (shapes(*[(1, 32, n, 128)] * 3) for n in (8192, 50))
    with caplog.at_level("INFO"):
        assert trace_with_symbols(monkeypatch, "sm90", hints, actual) == (NotImplemented, [])
    assert "kernels in Gluon may take it" in caplog.text
    assert trace_with_symbols(monkeypatch, "gfx942", hints, actual)[1]
