"""Attention over paged and float8 caches: right, and the op reads the cache itself exactly where that was proved."""

from __future__ import annotations

from typing import Any

import kv_cache_programs as programs
import pytest
import torch

from rocm_attn_compile.pipeline import compile_graph
from rocm_attn_compile.rewrite import builder
from rocm_attn_compile.testing import assert_as_accurate_as_eager, compile_and_capture


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else copied(value)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def run(program: programs.Program, **how: Any) -> Any:
    """The compiled program, after its result and what it wrote were compared with eager."""
    eager_inputs, exact_inputs = [copied(x) for x in program.inputs], [in_float64(x) for x in program.inputs]
    inputs = [copied(x) for x in program.inputs]
    with torch.no_grad():
        eager, exact = program.function(*eager_inputs), program.function(*exact_inputs)
        found = compile_and_capture(program.function, *inputs, **how)
    assert_as_accurate_as_eager(found.result, eager, exact)
    for mine, theirs in zip(inputs, eager_inputs):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
    return found


def op_call(found: Any) -> torch.fx.Node:
    calls = [
        node
        for graph in found.graphs
        for node in graph.graph.nodes
        if node.target is torch.ops.rocm_attn.attention.default
    ]
    assert len(calls) == 1
    return calls[0]


def reads_cache(found: Any) -> bool:
    """Whether the op reads the cache; then nothing of the size of what would be gathered is left in the graph."""
    call = op_call(found)
    if not {"block_table", "k_scale"} & set(call.kwargs):
        return False
    gathered = {programs.B * programs.N * heads * programs.D for heads in (1, programs.K, programs.H)}
    if "block_table" in call.kwargs:
        sizes = [
            node.meta["example_value"].numel()
            for node in call.graph.nodes
            if node.op != "placeholder" and isinstance(node.meta.get("example_value"), torch.Tensor)
        ]
        assert not gathered & set(sizes)
    return True


def notes(found: Any) -> set[str]:
    return {note.code for site in found.sites for note in site.notes}


def parameters(which: Any) -> list[Any]:
    return [pytest.param(program, id=program.name.replace(" ", "-")) for program in which]


@pytest.mark.parametrize("program", parameters(programs.RECOGNISED))
def test_recognised(program: programs.Program) -> None:
    found = run(program)
    assert reads_cache(found), notes(found)
    assert not notes(found)
    call = op_call(found)
    assert ("block_table" in call.kwargs) == ("table" in program.function.__code__.co_varnames)
    assert ("k_scale" in call.kwargs) == (program.inputs[1].dtype.itemsize == 1)


@pytest.mark.parametrize("program", parameters(programs.NEAR))
def test_near_misses_stay_right(program: programs.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small tensors are copied before they are overwritten; a cache is not small.
    monkeypatch.setattr(builder, "_SNAPSHOT_LIMIT", 100)
    found = run(program)
    if program.note is not None:
        assert not reads_cache(found)
        assert notes(found) == ({program.note} if program.note else set())


@pytest.mark.parametrize("index", [0, 11, 14, 18])
def test_under_verification(index: int) -> None:
    """Both ways are run on random caches, tables and scales when it is compiled."""
    found = run(programs.RECOGNISED[index], options={"verify": True})
    assert reads_cache(found), found.reason_codes


@pytest.mark.parametrize("index", [3, 12, 15])
def test_through_inductor(index: int) -> None:
    assert reads_cache(run(programs.RECOGNISED[index], lowering="inductor"))


CHANGED = {
    "blocks of 8 on a GPU": (programs.by_index, programs.make(size=8), {"arch": "gfx942"}, "cache_gathered"),
    "blocks of 8 on the CPU": (programs.by_index, programs.make(size=8), {}, None),
    "e4m3fnuz where there is none": (
        programs.dequantised_contiguous,
        programs.float8(torch.float8_e4m3fnuz, contiguous=True),
        {"arch": "gfx950"},
        "cache_gathered",
    ),
    "e4m3fnuz on gfx942": (
        programs.dequantised_contiguous,
        programs.float8(torch.float8_e4m3fnuz, contiguous=True),
        {"arch": "gfx942"},
        None,
    ),
    "float8 for float32": (
        programs.dequantised_contiguous,
        (programs.float8(contiguous=True)[0].float(), *programs.float8(contiguous=True)[1:]),
        {},
        "cache_dtype",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_backend_cannot_read_is_gathered(name: str) -> None:
    function, inputs, options, note = CHANGED[name]
    found = run(programs.Program(name, function, inputs), options=options)
    assert notes(found) == ({note} if note else set())
    assert reads_cache(found) == (note is None)


def test_gradients_flow_through_what_was_gathered() -> None:
    q, k, v, table, lengths = programs.make(torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found = compile_and_capture(programs.by_index, *leaves, table, lengths)
    assert notes(found) == {"cache_training"}
    assert "block_table" not in op_call(found).kwargs
    others = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(programs.by_index(*others, table, lengths).square().sum(), others)
    for a, b in zip(torch.autograd.grad(found.result.square().sum(), leaves), want):
        torch.testing.assert_close(a, b)


def test_dynamic_batch_and_number_of_blocks() -> None:
    """One graph serves other batches and longer tables."""
    counter = CompileCounter()
    function = programs.by_reshape_and_sdpa  # a division by a number of heads that is a symbol is another matter
    compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, per_row, blocks in ((5, 3, 9), (3, 5, 17), (4, 7, 8)):
            q = torch.randn(batch, programs.H, 1, programs.D)
            k, v = (torch.randn(blocks, programs.SIZE, programs.K, programs.D) for _ in range(2))
            table = torch.randint(blocks, (batch, per_row), dtype=torch.int32)
            lengths = torch.randint(1, per_row * programs.SIZE, (batch, 1))
            torch.testing.assert_close(compiled(q, k, v, table, lengths), function(q, k, v, table, lengths))
    assert len(counter.graphs) == 1
    assert "block_table" in counter.calls[0].kwargs


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "float8"])
def test_decoding_with_a_cache_written_in_place(cache_dtype: torch.dtype) -> None:
    """Twenty steps over pages that are handed out while decoding: the tokens of eager, and its cache."""
    model = Decoder(cache_dtype)
    counter = CompileCounter()
    with torch.no_grad():
        want, cache = decode(model, model)
        got, mine = decode(model, torch.compile(model, backend=counter, fullgraph=True))
    assert torch.equal(got, want)
    assert torch.equal(mine.view(torch.uint8), cache.view(torch.uint8))
    assert len(counter.graphs) == 1
    assert "block_table" in counter.calls[0].kwargs


class CompileCounter:
    """A backend that compiles as ours does, and keeps the graphs and the calls of the op in them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.calls: list[torch.fx.Node] = []

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled = compile_graph(graph_module, example_inputs, lowering="aot_eager")
        self.graphs.append(graph_module)
        op = torch.ops.rocm_attn.attention.default
        self.calls += [node for node in graph_module.graph.nodes if node.target is op]
        return compiled


class Decoder(torch.nn.Module):
    """One layer, as a serving engine would write it: writes the new token's key and value, attends, projects."""

    def __init__(self, cache_dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        heads, kv_heads, width, self.vocabulary = 4, 2, 16, 50
        self.heads, self.kv_heads, self.cache_dtype = heads, kv_heads, cache_dtype
        self.embedding = torch.nn.Embedding(self.vocabulary, 64)
        self.qkv = torch.nn.Linear(64, (heads + 2 * kv_heads) * width)
        self.out = torch.nn.Linear(heads * width, self.vocabulary)
        self.register_buffer("scale", torch.tensor(0.05))
        self.to(torch.bfloat16)

    def forward(self, tokens, cache, table, lengths):
        batch = tokens.shape[0]
        qkv = self.qkv(self.embedding(tokens)).view(batch, -1, 16)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        size = cache.shape[2]
        block = table.gather(1, (lengths // size)[:, None].long())[:, 0]
        for part, new in ((0, k), (1, v)):
            new = (new / self.scale).to(self.cache_dtype) if self.cache_dtype.itemsize == 1 else new
            cache[part].view(-1, self.kv_heads, 16).view(torch.uint8 if new.element_size() == 1 else new.dtype)[
                block * size + lengths % size
            ] = new.view(torch.uint8) if new.element_size() == 1 else new
        k, v = (cache[part][table].flatten(1, 2) for part in (0, 1))
        if self.cache_dtype.itemsize == 1:
            k, v = (x.to(q.dtype) * self.scale for x in (k, v))
        keep = torch.arange(k.shape[1]) <= lengths[:, None]
        q = q.unflatten(1, (self.kv_heads, -1))
        scores = torch.einsum("bkgd,bnkd->bkgn", q, k) / 4
        weights = scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
        return self.out(torch.einsum("bkgn,bnkd->bkgd", weights, v).reshape(batch, -1)).argmax(-1)


def decode(model: Decoder, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of 20 steps of a batch of 3, and the cache after them."""
    cache = torch.zeros(2, 9, 16, 2, 16).to(model.cache_dtype)
    table = torch.tensor([[4, 7], [0, 2], [8, 1]], dtype=torch.int32)
    tokens, lengths, seen = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]), []
    for _ in range(20):
        tokens = step(tokens, cache, table, lengths)
        lengths = lengths + 1
        seen.append(tokens)
    return torch.stack(seen), cache
