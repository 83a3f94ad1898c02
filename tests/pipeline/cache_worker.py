"""Run in a process of its own by test_caches.py: compile one training step and print what the caches did, as JSON."""

import json

import torch
from torch._dynamo.utils import counters


def attend(q, k, v):
    """Nothing but attention: Inductor has no C++ to compile."""
    return (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v


def main() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3)]
    out = torch.compile(attend, backend="rocm_attn", fullgraph=True, options={"inline": False})(*inputs)
    grads = torch.autograd.grad(out.sum(), inputs)
    want = attend(*inputs)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), inputs))

    import rocm_attn_compile

    (report,) = rocm_attn_compile.reports()
    (site,) = report.sites
    names = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
    caches = {name: counters["aot_autograd"][name] for name in names}
    caches |= {name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}
    print(json.dumps({"caches": caches, "impl": site.impl, "backend": site.backend}))


if __name__ == "__main__":
    main()
