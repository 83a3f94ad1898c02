"""The shortest use: compile a function that computes attention, see that it was replaced.

Nothing of ours is imported to compile: `pip install` made the name "rocm_attn" known to torch.compile.
"""

import torch


def attention(q, k, v):
    """Causal attention as one writes it down. q, k, v: `(batch, num_heads, length, head_dim)`."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a ROCm GPU is called "cuda" too
    q, k, v = (torch.randn(2, 8, 300, 64, device=device) for _ in range(3))

    compiled = torch.compile(attention, backend="rocm_attn")
    out = compiled(q, k, v)

    print("largest difference to eager:", (out - attention(q, k, v)).abs().max().item())

    import rocm_attn_compile  # only to ask what happened

    for report in rocm_attn_compile.reports():
        print(report)


if __name__ == "__main__":
    main()
