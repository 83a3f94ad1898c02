"""Random mask programs: functions of a few small tensors, composed of the ops that masks are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

Term = Callable[["Inputs"], torch.Tensor]


@dataclass
class Inputs:
    """What a program reads. M and N come from the shapes of `x` and `y`, so that they are symbols when dynamic."""

    x: torch.Tensor  # (M, 2)
    y: torch.Tensor  # (N, 2)
    of_query: torch.Tensor  # (M,) int64, small
    of_key: torch.Tensor  # (N,) int64, small
    keep_key: torch.Tensor  # (N,) bool
    position: torch.Tensor  # () int64

    @property
    def q(self) -> torch.Tensor:
        return torch.arange(self.x.shape[0])[:, None]

    @property
    def k(self) -> torch.Tensor:
        return torch.arange(self.y.shape[0])[None, :]

    def full(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as an (M, N) tensor of its own."""
        return x.expand(self.x.shape[0], self.y.shape[0]).clone()


def make_inputs(rng: random.Random, m: int, n: int) -> tuple[torch.Tensor, ...]:
    def numbers(count: int) -> torch.Tensor:
        return torch.tensor([rng.randint(-1, 4) for _ in range(count)], dtype=torch.int64)

    keep = torch.tensor([rng.random() < 0.7 for _ in range(n)])
    return torch.zeros(m, 2), torch.zeros(n, 2), numbers(m), numbers(n), keep, torch.tensor(rng.randint(0, 5))


class Generator:
    """Draws terms; each returns a tensor that broadcasts to (M, N)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def number(self, depth: int) -> Term:
        """An int64 term."""
        rng = self.rng
        if depth <= 0:
            c = rng.randint(-3, 6)
            return rng.choice(
                [
                    lambda i: i.q,
                    lambda i: i.k,
                    lambda i: i.k - i.q,
                    lambda i: i.q + i.position,
                    lambda i: i.of_query[:, None],
                    lambda i: i.of_key[None, :],
                    lambda i: torch.full((1, 1), c),
                ]
            )
        a, b, p = self.number(depth - 1), self.number(rng.randint(0, depth - 1)), self.truth(depth - 1)
        c, d = rng.randint(-3, 5), rng.choice([-3, -2, 2, 3, 4])
        return rng.choice(
            [
                lambda i: a(i) + b(i),
                lambda i: a(i) - b(i),
                lambda i: torch.add(a(i), b(i), alpha=c),
                lambda i: torch.rsub(a(i), c),
                lambda i: a(i) * c,
                lambda i: a(i) // d,
                lambda i: a(i) % d,
                lambda i: a(i).abs(),
                lambda i: -a(i),
                lambda i: ~a(i),
                lambda i: torch.maximum(a(i), b(i)),
                lambda i: torch.minimum(a(i), b(i)),
                lambda i: a(i).clamp(min=c),
                lambda i: a(i).clamp(-2, max(c, -1)),
                lambda i: torch.where(p(i), a(i), b(i)),
                lambda i: p(i).long(),
                lambda i: p(i).to(torch.int32) * 3 + a(i),
                lambda i: a(i).to(torch.int32).to(torch.int64),
                lambda i: a(i).to(torch.float32).to(torch.int64),
                lambda i: a(i).masked_fill(p(i), c),
                lambda i: i.of_key[a(i).clamp(0, 1) % i.y.shape[0]],
                lambda i: torch.sign(a(i)),
                lambda i: a(i) * b(i),
            ]
        )

    def truth(self, depth: int) -> Term:
        """A bool term."""
        rng = self.rng
        if depth <= 0:
            c = rng.randint(-3, 4)
            return rng.choice(
                [
                    lambda i: i.k <= i.q + c,
                    lambda i: i.k > i.q + c,
                    lambda i: i.k < i.of_query[:, None],
                    lambda i: i.keep_key[None, :],
                    lambda i: i.of_query[:, None] == i.of_key[None, :],
                    lambda i: i.full(torch.ones(1, 1, dtype=torch.bool)).tril(c),
                    lambda i: i.full(torch.ones(1, 1)).triu(c).bool(),
                ]
            )
        a, b = self.number(depth - 1), self.number(depth - 1)
        p, r = self.truth(depth - 1), self.truth(rng.randint(0, depth - 1))
        c, h = rng.randint(-3, 4), rng.choice([-0.5, 0.5, 1.5, 2.0, float("inf"), -1e9])
        compare = rng.choice([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne])
        return rng.choice(
            [
                lambda i: compare(a(i), b(i)),
                lambda i: compare(a(i), c),
                lambda i: compare(a(i), h),
                lambda i: compare(a(i).to(torch.float32), h),
                lambda i: p(i) & r(i),
                lambda i: p(i) | r(i),
                lambda i: p(i) ^ r(i),
                lambda i: ~p(i),
                lambda i: p(i) == r(i),
                lambda i: torch.logical_or(p(i), a(i)),
                lambda i: torch.where(p(i), r(i), a(i) > 1),
                lambda i: p(i).masked_fill(r(i), bool(c % 2)),
                lambda i: a(i).bool(),
                lambda i: (1.0 - p(i).float()) * c < r(i).float(),
                lambda i: i.full(p(i)).tril(c),
                lambda i: i.full(p(i)).triu(c),
                lambda i: self.assigned(i.full(p(i)), i.full(r(i)), c),
                lambda i: torch.cat([i.full(p(i)), i.full(r(i))], 1)[:, 1 : i.y.shape[0] + 1],
                lambda i: torch.cat([i.full(p(i))[:1], i.full(r(i))], 0)[: i.x.shape[0]],
                lambda i: torch.nn.functional.pad(i.full(p(i)), (1, 0), value=bool(c % 2))[:, : i.y.shape[0]],
                lambda i: torch.nn.functional.pad(i.full(p(i)), (-1, 1, 1, -1)),
                lambda i: i.full(p(i)).flip(c % 2),
                lambda i: i.full(p(i)).roll(c, 1),
                lambda i: i.full(p(i)).reshape(-1).view(i.x.shape[0], i.y.shape[0]),
                lambda i: i.full(p(i)).t().contiguous().view(i.y.shape[0], i.x.shape[0]).permute(1, 0),
                lambda i: torch.stack([i.full(p(i)), i.full(r(i))])[c % 2],
                lambda i: i.full(p(i)).repeat(1, 2)[:, : i.y.shape[0]],
                lambda i: i.full(p(i))[:, i.k[0]],
                lambda i: i.full(p(i))[i.q, i.k],
                lambda i: i.full(p(i)).index_select(0, torch.arange(i.x.shape[0])),
            ]
        )

    @staticmethod
    def assigned(base: torch.Tensor, other: torch.Tensor, c: int) -> torch.Tensor:
        """Part of `base` overwritten, by one of several spellings."""
        if c == 0:
            base[1:, :1] = True
        elif c == 1:
            base[0] = other[0]
        elif c == 2:
            base[:, -1] = False
        elif c == 3:
            base[1:] |= other[1:]
        elif c == 4:
            base[:, ::2] = False
        elif c == -1:
            base.masked_fill_(other, False)
        elif c == -2:
            base[other] = True
        else:
            base[torch.arange(1), :] = other[:1]
        return base
