"""Errors, dispatch, the dropout rule, and what importing the ops loads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import rocm_attn_compile.ops as ops
from rocm_attn_compile.ops import dispatch
from rocm_attn_compile.ops.reference import philox_keep_mask

ROOT = Path(__file__).parents[2]


def run_fresh(code: str, **environment: str) -> str:
    """Standard output of a new Python process."""
    import os

    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


q = torch.randn(2, 4, 5, 8)
k = torch.randn(2, 2, 6, 8)
BAD = {
    "k has 3 dims": ({"k": k[0]}, "need 4 dims"),
    "other dtype": ({"k": k.double()}, "must have one dtype"),
    "integers": ({"q": q.int(), "k": k.int(), "v": k.int()}, "allowed are float16"),
    "other batch": ({"k": k[:1]}, r"k is \(1, 2, 6, 8\)"),
    "other head_dim": ({"k": k[..., :4]}, r"k is \(2, 2, 6, 4\)"),
    "v has other length": ({"v": k[:, :, :3]}, r"v is \(2, 2, 3, 8\)"),
    "v has other heads": ({"v": k[:, :1]}, r"v is \(2, 1, 6, 8\)"),
    "heads do not divide": ({"q": q[:, :3]}, "must divide"),
    "bias shape": ({"attn_bias": torch.zeros(2, 4, 5, 5)}, "attn_bias is"),
    "bias dims": ({"attn_bias": torch.zeros(5, 6)}, "attn_bias is"),
    "bias dtype": ({"attn_bias": torch.zeros(1, 1, 5, 6, dtype=torch.bool)}, "need a float"),
    "mask dtype": ({"attn_mask": torch.zeros(1, 1, 5, 6)}, "need bool"),
    "mask batch": ({"attn_mask": torch.zeros(3, 1, 5, 6, dtype=torch.bool)}, "attn_mask is"),
    "key_mask shape": ({"key_mask": torch.zeros(2, 5, dtype=torch.bool)}, "key_mask is"),
    "kv_end dtype": ({"kv_end": torch.zeros(2, 5)}, "int32 or int64"),
    "kv_start shape": ({"kv_start": torch.zeros(5, dtype=torch.int64)}, "kv_start is"),
    "one id tensor": ({"q_ids": torch.zeros(2, 5, dtype=torch.int64)}, "both or neither"),
    "sinks shape": ({"sinks": torch.zeros(2)}, "sinks is"),
    "slopes shape": ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes is \(2,\); need \(4\)"),
    "slopes batch": ({"alibi_slopes": torch.zeros(1, 4)}, r"alibi_slopes is \(1, 4\); need \(2, 4\)"),
    "slopes dtype": ({"alibi_slopes": torch.zeros(4, dtype=torch.bfloat16)}, "need torch.float32 beside"),
    "dropout without seed": ({"dropout_p": 0.5}, "without dropout_seed"),
    "dropout of all": ({"dropout_p": 1.0, "dropout_seed": torch.tensor(1)}, "dropout_p is"),
    "seed dtype": ({"dropout_p": 0.5, "dropout_seed": torch.tensor(1.0)}, "need int64"),
    "empty_rows": ({"empty_rows": "none"}, "empty_rows is 'none'"),
    "out_layout": ({"out_layout": "sbhd"}, "out_layout is 'sbhd'"),
}


@pytest.mark.parametrize("impl", ["", "REFERENCE"])
@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what, impl):
    changed, text = BAD[what]
    args = {"q": q, "k": k, "v": k, **changed}
    for device in ("cpu", "meta"):
        moved = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in args.items()}
        with pytest.raises(ValueError, match=text):
            ops.attention(**moved, softmax_scale=0.3, impl=impl)


def test_backward_checks_its_tensors():
    out, lse = ops.attention(q, k, k, softmax_scale=0.3)
    rest = (0.3, None, None, None, 0.0, "nan", "", [True] * 5)
    with pytest.raises(ValueError, match="grad_out is"):
        ops.attention_backward(out[:1], q, k, k, *[None] * 10, out, lse, *rest)
    with pytest.raises(ValueError, match="lse is"):
        ops.attention_backward(out, q, k, k, *[None] * 10, out, lse[:1], *rest)


def test_unknown_implementation_lists_the_known():
    with pytest.raises(ValueError, match="TRITON_ATTN, REFERENCE"):
        ops.attention(q, k, k, softmax_scale=0.3, impl="FAST_ATTN@123")
    with pytest.raises(ValueError, match="NO_SUCH"):
        ops.implementation("NO_SUCH", "cuda")


def test_only_the_part_before_the_hash_selects():
    assert ops.implementation("TRITON_ATTN@0123", "cpu").name == ops.implementation("", "cpu").name == "CPU"
    assert ops.implementation("REFERENCE@0123", "cpu").name == "REFERENCE"
    assert ops.implementation("REFERENCE", "cuda").name == "REFERENCE"
    first = ops.attention(q, k, k, softmax_scale=0.3, impl="TRITON_ATTN@0123")
    torch.testing.assert_close(first, ops.attention(q, k, k, softmax_scale=0.3, impl="REFERENCE@ffff"))


def test_kernel_modules_are_found_lazily(monkeypatch):
    """A GPU call imports the module of its backend, once, and passes the op's arguments and what tuning chose."""
    calls = []

    class Kernel:
        @staticmethod
        def attention_forward(*args, **kwargs):
            calls.append((len(args), kwargs))
            return q, q

        @staticmethod
        def attention_backward(**kwargs):
            calls.append(kwargs)
            return (q,) * 5

    imported = []
    monkeypatch.setattr(dispatch, "_found", {"cpu": {}, "cuda": {}})
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: imported.append(name) or Kernel)
    dispatch.run_gpu((q, k, k), {"softmax_scale": 0.3, "impl": "TRITON_ATTN@12"})
    dispatch.run_gpu((q, k, k), {"softmax_scale": 0.3, "impl": "TRITON_ATTN@12"})
    assert imported == ["rocm_attn_compile.kernels.triton.attention"]
    assert calls[0] == (3, {"softmax_scale": 0.3, "tuned": "", "opaque": True})
    dispatch.run_gpu((q, k, k), {"softmax_scale": 0.3, "impl": "TRITON_ATTN@12~forward=1+inline"})
    assert calls[-1] == (3, {"softmax_scale": 0.3, "tuned": "forward=1", "opaque": True})
    dispatch.run_backward_gpu(
        *[q] * 4, *[None] * 10, q, q, 0.3, None, None, None, 0.0, "nan", "TRITON_ATTN@12", [True] * 5
    )
    assert calls[-1].pop("tuned") == "" and calls[-1].pop("opaque") is True
    assert list(calls[-1]) == [
        "grad_out", "q", "k", "v", "attn_bias", "attn_mask", "key_mask", "kv_start", "kv_end", "q_ids", "kv_ids",
        "sinks", "dropout_seed", "alibi_slopes", "out", "lse", "softmax_scale", "logits_soft_cap", "band_lower",
        "band_upper", "dropout_p", "empty_rows", "output_mask",
    ]  # fmt: skip


def test_importing_the_ops_needs_torch_only():
    """With triton blocked; and the ops are there at once, not after a first call."""
    out = run_fresh(
        """
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("triton", "transformers", "aiter"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Block())
        import torch
        assert not hasattr(torch.ops.rocm_attn, "attention")
        import rocm_attn_compile.ops as ops
        ops.register(); ops.register()
        q = torch.randn(1, 2, 3, 4, requires_grad=True)
        torch.ops.rocm_attn.attention(q, q, q, softmax_scale=0.5)[0].sum().backward()
        loaded = [m for m in sys.modules if m.split(".")[0] in ("triton", "transformers")]
        loaded += [m for m in sys.modules if m.startswith("rocm_attn_compile.kernels")]
        print(q.grad.shape, loaded)
        """
    )
    assert out == "torch.Size([1, 2, 3, 4]) []"


def test_without_the_private_names_first_gradients_still_work():
    out = run_fresh(
        """
        import torch
        import torch._functorch.autograd_function, torch._functorch.utils
        del torch._functorch.utils.enable_single_level_autograd_function
        import rocm_attn_compile.ops as ops
        from rocm_attn_compile import _torch_private
        assert not _torch_private.SINGLE_LEVEL_AUTOGRAD
        q, k, v = (torch.randn(2, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
        bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
        sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
        run = lambda *a: ops.attention(*a[:4], sinks=a[4], softmax_scale=0.3, band_upper=0)[0]
        print(torch.autograd.gradcheck(run, (q, k, v, bias, sinks)))
        """
    )
    assert out == "True"


def test_philox_is_tritons_rand():
    """The interpreter runs Triton's own tl.rand; the reference must draw the same numbers, for any seed."""
    pytest.importorskip("triton")
    code = """
        import torch, triton, triton.language as tl
        from rocm_attn_compile.ops.reference import philox_keep_mask

        @triton.jit
        def draw(out, seed, start, SIZE: tl.constexpr):
            index = tl.arange(0, SIZE)
            tl.store(out + index, tl.rand(tl.load(seed), start + index))

        for seed in (0, 1, 123456789, 2**40 + 17, -5):
            uniform = torch.empty(512)
            draw[(1,)](uniform, torch.tensor([seed]), 0, 512)
            for p in (0.1, 0.5, 0.9):
                keep = philox_keep_mask(torch.tensor(seed), p, 2, 4, 8, 8)
                assert torch.equal((uniform >= p).view(2, 4, 8, 8), keep), seed
            assert uniform.min() >= 0 and uniform.max() < 1
        print("same")
        """
    path = Path(__file__).parent / "_philox_probe.py"
    path.write_text(textwrap.dedent(code))  # triton.jit needs a source file
    try:
        assert run_fresh(f"import runpy; runpy.run_path({str(path)!r})", TRITON_INTERPRET="1") == "same"
    finally:
        path.unlink()


def test_philox_statistics():
    keep = philox_keep_mask(torch.tensor(42), 0.3, 4, 8, 32, 32)
    assert abs(keep.float().mean().item() - 0.7) < 5 * (0.3 * 0.7 / keep.numel()) ** 0.5
    assert not torch.equal(keep, philox_keep_mask(torch.tensor(43), 0.3, 4, 8, 32, 32))
