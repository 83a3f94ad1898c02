"""A Hugging Face model: a small Llama with random weights, two prompts of different length in one padded batch.

Eager attention in, our op out; padding and causality are read off the mask that transformers computes in the graph.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rocm_attn_compile


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(device)

    tokens = torch.randint(0, config.vocab_size, (2, 90), device=device)
    keep = torch.ones_like(tokens)
    keep[1, 60:] = 0  # the second prompt has 60 tokens, the rest is padding

    compiled = torch.compile(model, backend="rocm_attn", fullgraph=True)
    with torch.no_grad():
        expected = model(tokens, attention_mask=keep, use_cache=False).logits
        logits = compiled(tokens, attention_mask=keep, use_cache=False).logits

    real = keep.bool()
    print("largest difference to eager:", (logits - expected)[real].abs().max().item())
    for report in rocm_attn_compile.reports():
        for site in report.sites:
            print(f"{site.source}: {site.spec}; {site.mask}; {site.backend if site.replaced else 'not replaced'}")


if __name__ == "__main__":
    main()
