"""What would be replaced, by what, and what not and why: without compiling anything.

One block of this model is attention. The other looks like it, but its softmax runs over the heads.
"""

import torch
from torch import nn

import rocm_attn_compile


class Block(nn.Module):
    """Attention with grouped heads: 8 query heads share 2 key/value heads. `over` is the axis of the softmax."""

    def __init__(self, over):
        super().__init__()
        self.over = over
        self.q, self.kv, self.out = nn.Linear(256, 256), nn.Linear(256, 128), nn.Linear(256, 256)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 8, 32).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, 2, 32).permute(2, 0, 3, 1, 4)
        k, v = k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1)
        weights = torch.softmax(q @ k.mT * 32**-0.5, dim=self.over)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, 256))


def main():
    model = nn.Sequential(Block(over=-1), nn.GELU(), Block(over=1)).eval()
    with torch.no_grad():
        explanation = rocm_attn_compile.explain(model)(torch.randn(3, 70, 256))
    print(explanation)
    for site in explanation.sites:
        if not site.replaced:
            print("left alone:", site.source, site.reasons[0].code)


if __name__ == "__main__":
    main()
