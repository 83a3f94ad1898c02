"""Training: the rewrite happens before autograd, so the backward pass is the op's own and needs no pattern.

A tiny character model with a learned relative position bias learns to repeat a text, eagerly and compiled.
"""

import torch
import torch.nn.functional as F
from torch import nn

import rocm_attn_compile

TEXT = "the quick brown fox jumps over the lazy dog. " * 6
LENGTH = 64


class Model(nn.Module):
    """One attention layer; `bias` is `(num_heads, LENGTH)`, indexed by how far back a key lies."""

    def __init__(self, vocab, dim=64, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.qkv, self.bias = nn.Linear(dim, 3 * dim), nn.Parameter(torch.zeros(num_heads, LENGTH))
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        self.register_buffer("distance", distance.clamp(min=0))
        self.register_buffer("causal", distance >= 0)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + self.bias[:, self.distance]
        weights = scores.masked_fill(~self.causal, float("-inf")).softmax(-1)
        return self.head(x + (weights @ v).transpose(1, 2).flatten(-2))


def train(backend):
    """The losses of 30 steps; the model is compiled unless `backend` is None."""
    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    data = torch.tensor([letters.index(letter) for letter in TEXT])
    model = Model(len(letters))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    compiled = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    losses = []
    for step in range(30):
        batch = torch.stack([data[i + step : i + step + LENGTH + 1] for i in range(0, 120, 30)])
        loss = F.cross_entropy(compiled(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    eager, compiled = train(None), train("rocm_attn")
    for step in (0, 9, 19, 29):
        print(f"step {step + 1:2}: loss {eager[step]:.5f} eagerly, {compiled[step]:.5f} compiled")
    sites = [site for report in rocm_attn_compile.reports() for site in report.sites]
    print(f"{sum(site.replaced for site in sites)} of {len(sites)} attention sites replaced")


if __name__ == "__main__":
    main()
