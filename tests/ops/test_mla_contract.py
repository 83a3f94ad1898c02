"""Errors, dispatch, opcheck, transforms and compilation of the ops of latent attention."""

from __future__ import annotations

import pytest
import torch
from latent_cases import MASKS, SIZES, attend, latent, paged, rows, seeded
from test_op_contract import run_fresh
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, jvp, vmap
from torch.library import opcheck

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops import mla_dispatch

CASES = {**MASKS, **SIZES}
CHECKED = {
    "causal": torch.float32, "key-mask": torch.bfloat16, "kv-range": torch.float16, "no-rope": torch.float64,
    "decode": torch.float32,
}  # fmt: skip
B, H, M, N, P, R, C, E = 2, 3, 5, 9, 8, 6, 12, 10
whole = {
    "q_nope": torch.randn(B, H, M, P), "q_pe": torch.randn(B, H, M, R), "kv_c": torch.randn(B, N, C),
    "k_pe": torch.randn(B, N, R), "w_uk": torch.randn(H, P, C), "w_uv": torch.randn(H, E, C),
}  # fmt: skip
table = torch.zeros(B, 1, dtype=torch.int32)
ends = torch.ones(B, 1, dtype=torch.int64)
BAD = {
    "q has 3 dims": ({"q_nope": whole["q_nope"][0]}, "q_nope is .* need 4 dims"),
    "other dtype": ({"kv_c": whole["kv_c"].double()}, "kv_c torch.float64.*must be one"),
    "integers": ({name: t.int() for name, t in whole.items()}, "allowed are float16"),
    "cache of another batch": ({"kv_c": whole["kv_c"][:1]}, r"kv_c is \(1, 9, 12\)"),
    "cache with heads": ({"kv_c": whole["kv_c"][:, None]}, "kv_c is .*need 3 dims"),
    "rope alone": ({"k_pe": None}, "go together"),
    "rope of other width": ({"k_pe": whole["k_pe"][..., :4]}, r"k_pe is \(2, 9, 4\)"),
    "rope of other length": ({"k_pe": whole["k_pe"][:, :4]}, r"k_pe is \(2, 4, 6\)"),
    "rope with heads": ({"k_pe": whole["k_pe"][:, None]}, "k_pe is"),
    "w_uk transposed": ({"w_uk": whole["w_uk"].mT}, r"w_uk is \(3, 12, 8\); need \(3, 8, 12\)"),
    "w_uv of other heads": ({"w_uv": whole["w_uv"][:2]}, r"w_uv is \(2, 10, 12\)"),
    "key_mask shape": ({"key_mask": torch.ones(B, N + 1, dtype=torch.bool)}, "key_mask is"),
    "kv_end dtype": ({"kv_end": torch.ones(B, 1)}, "int32 or int64"),
    "pages without lengths": ({"block_table": table}, "without kv_end"),
    "block table dtype": ({"block_table": table.long(), "kv_end": ends}, "need int32"),
    "block table batch": ({"block_table": table[:1], "kv_end": ends}, "block_table is"),
    "key_mask of pages": (
        {"block_table": table, "kv_end": ends, "key_mask": torch.ones(B, N + 1, dtype=torch.bool)}, "key_mask is",
    ),
    "empty_rows": ({"empty_rows": "none"}, "empty_rows is 'none'"),
    "out_layout": ({"out_layout": "sbhd"}, "out_layout is 'sbhd'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    changed, text = BAD[what]
    args = {**whole, **changed}
    for device in ("cpu", "meta"):
        moved = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in args.items()}
        with pytest.raises(ValueError, match=text):
            ops.mla(**moved, softmax_scale=0.3)


def test_bad_arguments_of_the_forms():
    call = seeded(MASKS["none"])
    q_nope, q_pe, k_nope, k_pe, v = call.prefill
    with pytest.raises(ValueError, match=r"k_nope is \(2, 1, 9, 8\)"):
        ops.mla_prefill(q_nope, q_pe, k_nope[:, :1], k_pe, v, softmax_scale=0.3)
    with pytest.raises(ValueError, match=r"v is \(2, 3, 4, 10\)"):
        ops.mla_prefill(q_nope, q_pe, k_nope, k_pe, v[:, :, :4], softmax_scale=0.3)
    with pytest.raises(ValueError, match=r"kv_c is \(2, 9, 12\); need \(2, 9, 11\)"):
        ops.mla_decode(call.decode[0][..., :11], q_pe, call.kv_c, k_pe, softmax_scale=0.3)
    with pytest.raises(ValueError, match="k_pe is on meta, q_nope on cpu"):
        ops.mla_prefill(q_nope, q_pe, k_nope, k_pe.to("meta"), v, softmax_scale=0.3)


def test_unknown_implementation_lists_the_known():
    for impl in ("TRITON_ATTN@1", "FAST"):
        with pytest.raises(ValueError, match="TRITON_MLA, REFERENCE"):
            ops.mla(*whole.values(), softmax_scale=0.3, impl=impl)


def test_kernel_modules_are_found_lazily(monkeypatch):
    """A GPU call imports the module of its backend, once, and passes the op's arguments without impl."""
    calls, imported = [], []
    call = seeded(MASKS["kv-end"])
    result = torch.zeros(2, 3, 5, 12, dtype=torch.float64), torch.zeros(2, 3, 5)

    class Kernel:
        @staticmethod
        def mla_decode(*args, **kwargs):
            calls.append(("decode", len(args), sorted(kwargs)))
            return result

        @staticmethod
        def mla_prefill(*args, **kwargs):
            calls.append(("prefill", len(args), sorted(kwargs)))
            return result

        @staticmethod
        def mla_prefill_backward(*args, **kwargs):
            calls.append(("backward", len(args), sorted(kwargs)))
            return args[1:6]

    monkeypatch.setattr(mla_dispatch, "_found", {"cpu": {}, "cuda": {}})
    monkeypatch.setattr(mla_dispatch.importlib, "import_module", lambda name: imported.append(name) or Kernel)
    settings = {"softmax_scale": 0.3, "impl": "TRITON_MLA@12"}
    mla_dispatch.run_decode("cuda", (*call.decode, None, None, None, call.masks["kv_end"]), dict(settings))
    mla_dispatch.run_prefill("cuda", call.prefill, dict(settings))
    monkeypatch.setattr(mla_dispatch, "prefers_absorbed", lambda *_, **__: True)
    mla_dispatch.run_whole("cuda", call.whole, dict(settings))
    out = torch.zeros(2, 3, 5, 10, dtype=torch.float64)
    args = (out, *call.prefill, None, None, None, out, torch.zeros(2, 3, 5), 0.3, None, None, "nan", "", [True] * 5)
    mla_dispatch.run_prefill_backward("cuda", args)
    assert imported == ["rocm_attn_compile.kernels.triton.mla"] * 2  # for two values of impl
    backward = ["band_lower", "band_upper", "empty_rows", "output_mask", "softmax_scale"]
    assert calls == [
        ("decode", 8, ["softmax_scale"]), ("prefill", 8, ["softmax_scale"]),
        ("decode", 8, ["softmax_scale"]),
        ("backward", 11, backward),
    ]  # fmt: skip


def succeeded(checked: dict[str, str]) -> bool:
    return all(result == "SUCCESS" for result in checked.values())


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name):
    call = seeded(CASES[name]).to(CHECKED[name], requires_grad=True)
    masks = tuple(call.masks.get(mask) for mask in ("key_mask", "kv_start", "kv_end"))
    settings = {**call.settings, "out_layout": "bshd"}
    prefill = tuple(None if t is None else t.detach().requires_grad_() for t in call.prefill)
    assert succeeded(opcheck(ops.mla_prefill, (*prefill, *masks), settings))
    assert succeeded(opcheck(ops.mla, (*call.whole, None, *masks), settings))
    decode = tuple(None if t is None else t.detach() for t in call.decode)
    assert succeeded(opcheck(ops.mla_decode, (*decode, None, *masks), settings))
    with torch.no_grad():
        out, lse = ops.mla_prefill(*prefill, *masks, **call.settings)
    numbers = (call.settings["softmax_scale"], call.settings.get("band_lower"), call.settings.get("band_upper"))
    args = (torch.randn_like(out), *prefill, *masks, out, lse, *numbers, "nan", "", [True, False, True, True, True])
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert succeeded(opcheck(ops.mla_prefill_backward, args, test_utils=utilities))


def test_opcheck_of_pages():
    call = seeded(MASKS["kv-end"])
    kv_c, k_pe, table = paged(call, 4)
    args = (call.q_nope, call.q_pe, kv_c, k_pe, call.w_uk, call.w_uv, table, None, None, call.masks["kv_end"])
    assert succeeded(opcheck(ops.mla, args, call.settings))
    assert succeeded(opcheck(ops.mla_decode, (*call.decode[:2], kv_c, k_pe, *args[6:]), call.settings))


def test_gradgradcheck():
    call = seeded(lambda: latent({"kv_end": rows(3, 2)}, H=2, M=2, N=3, P=2, R=2, C=3, E=2, band_upper=1))
    leaves = tuple(t.requires_grad_() for t in call.whole)
    assert torch.autograd.gradgradcheck(lambda *t: ops.mla(*t, **call.kwargs)[0], leaves)


def test_forward_mode_and_func_grad():
    call = seeded(MASKS["key-mask"])
    names = list(call.tensors)

    def oracle(*tensors):
        call.tensors.update(zip(names, tensors))
        return attend(call)[0]

    def op(*tensors):
        call.tensors.update(zip(names, tensors))
        return ops.mla(*call.whole, **call.kwargs)[0]

    values = tuple(call.tensors.values())
    tangents = tuple(torch.randn_like(t) for t in values)
    torch.testing.assert_close(jvp(op, values, tangents), jvp(oracle, values, tangents))
    every = tuple(range(len(values)))
    got, want = (grad(lambda *t, f=f: f(*t).sin().sum(), every)(*values) for f in (op, oracle))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["causal", "no-rope", "kv-end"])
def test_vmap(name):
    """Over the batch of a stack of calls, with the weights shared; and gradients of each."""
    call = seeded(CASES[name])
    stacked = [None if t is None else torch.stack([t, t * 0.5 + 0.1]) for t in call.whole[:4]]
    dims = tuple(None if t is None else 0 for t in stacked)

    def one(*tensors):
        return ops.mla(*tensors, call.w_uk, call.w_uv, **call.kwargs)[0]

    slices = [[None if t is None else t[i] for t in stacked] for i in range(2)]
    torch.testing.assert_close(vmap(one, dims)(*stacked), torch.stack([one(*s) for s in slices]))
    slope = grad(lambda *tensors: one(*tensors).sin().sum())
    torch.testing.assert_close(vmap(slope, dims)(*stacked), torch.stack([slope(*s) for s in slices]))
    weights = torch.stack([call.w_uk, call.w_uk + 0.1])
    mapped = vmap(lambda w: ops.mla(*call.whole[:4], w, call.w_uv, **call.kwargs)[0])(weights)
    assert mapped.shape == (2, *attend(call)[0].shape)


def test_autocast():
    call = seeded(MASKS["causal"]).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.mla(*call.whole, **call.kwargs)[0].dtype == torch.bfloat16
        assert ops.mla_prefill(*call.prefill, **call.kwargs)[0].dtype == torch.bfloat16
        assert ops.mla_decode(*call.decode, **call.kwargs)[0].dtype == torch.bfloat16
        # The rewriter's calls: the casts are in the graph.
        assert ops.mla(*call.whole, **call.kwargs, impl="TRITON_MLA@1")[0].dtype == torch.float32


def test_compiled_with_any_length():
    """One graph for all lengths, the form chosen when it runs; trained, too."""
    graphs = []

    def backend(graph_module, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph_module)
        return aot_eager(graph_module, inputs)

    def model(call):
        return ops.mla(*call, softmax_scale=0.3, band_upper=call[2].shape[1] - call[0].shape[2])[0] * 2

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for q_len, kv_len in ((5, 9), (3, 21), (7, 7)):
        call = seeded(lambda: latent(M=q_len, N=kv_len, softmax_scale=0.3, band_upper=kv_len - q_len))  # noqa: B023
        torch.testing.assert_close(compiled(call.whole), attend(call)[0] * 2)
    assert len(graphs) == 1
    assert [node.target for node in graphs[0].graph.nodes if "rocm_attn" in str(node.target)] == [ops.mla]
    for q_len, kv_len in ((5, 9), (3, 21)):
        call = seeded(lambda: latent(M=q_len, N=kv_len, softmax_scale=0.3, band_upper=kv_len - q_len))  # noqa: B023
        leaves = call.to(torch.float64, requires_grad=True)
        got, want = (
            torch.autograd.grad(out.sin().sum(), tuple(leaves.tensors.values()))
            for out in (compiled(leaves.whole), attend(leaves)[0] * 2)
        )
        torch.testing.assert_close(got, want)
    assert len(graphs) == 2


@pytest.mark.parametrize("q_len", [1, 400])
def test_a_step_on_a_cache_of_any_length_is_absorbed_while_compiling(q_len):
    """Of DeepSeek's sizes; a prompt's form depends on how much is cached before it, and is chosen when it runs."""
    traced = []

    def compiler(graph_module, _inputs):
        traced.append([str(node.target) for node in graph_module.graph.nodes if "rocm_attn" in str(node.target)])
        return graph_module.forward

    sizes = {"H": 2, "P": 128, "R": 64, "C": 512, "E": 128}
    model = lambda *t: ops.mla(*t, softmax_scale=0.07, impl="TRITON_MLA@1+inline")[0]  # noqa: E731
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    for kv_len in (50, 71):
        call = seeded(lambda: latent(M=q_len, N=kv_len, softmax_scale=0.07, **sizes))  # noqa: B023
        for cache in (call.kv_c, call.k_pe):
            torch._dynamo.mark_dynamic(cache, 1)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*call.whole), attend(call)[0])
    assert traced == [["rocm_attn.mla_decode.default"] if q_len == 1 else ["rocm_attn.mla.default"]]


def test_without_the_private_names_first_gradients_still_work():
    out = run_fresh(
        """
        import torch
        import torch._functorch.autograd_function, torch._functorch.utils
        del torch._functorch.utils.enable_single_level_autograd_function
        import rocm_attn_compile.ops as ops
        from rocm_attn_compile import _torch_private
        assert not _torch_private.SINGLE_LEVEL_AUTOGRAD
        sizes = ((2, 2, 4, 3), (2, 2, 4, 2), (2, 5, 6), (2, 5, 2), (2, 3, 6), (2, 4, 6))
        leaves = tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
        run = lambda *a: ops.mla(*a, softmax_scale=0.3, band_upper=1)[0]
        print(torch.autograd.gradcheck(run, leaves))
        """
    )
    assert out == "True"


@pytest.mark.parametrize("q_len", [1, 9])
def test_written_out_in_a_trace(q_len):
    """With static sizes and `+inline` the compiler sees the products and the op of one form, else the op alone."""
    call = seeded(lambda: latent(M=q_len, band_upper=9 - q_len))
    traced = []

    def compiler(graph_module, _inputs):
        traced.append([str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"])
        return graph_module

    for impl in ("TRITON_MLA@1+inline", "TRITON_MLA@1"):
        model = lambda *t, impl=impl: ops.mla(*t, **call.kwargs, impl=impl, out_layout="bshd")  # noqa: E731
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), dynamic=False)
        torch.testing.assert_close(compiled(*call.whole), attend(call))
    inlined, opaque = traced
    assert any("mm.default" in name for name in inlined)
    assert [name for name in inlined if "rocm_attn" in name] == [
        "rocm_attn.mla_decode.default" if q_len == 1 else "rocm_attn.mla_prefill.default"
    ]
    assert opaque[0] == "rocm_attn.mla.default"
