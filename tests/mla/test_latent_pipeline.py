"""Latent attention through the rest of the pipeline: options, reports, backends, dead code, modes of autograd."""

from __future__ import annotations

import pytest
import torch
from latent_programs import (
    PROGRAMS,
    SCALE,
    B,
    C,
    E,
    H,
    M,
    P,
    R,
    X,
    attend,
    expanded,
    latents,
    one_token,
    pages,
    queries,
    step,
    two_paged_caches,
    w,
    written_so_far,
)
from pipeline_harness import check, codes, rand, sites
from recorder import Recorder

import rocm_attn_compile
from rocm_attn_compile.rewrite import latent as rewrite_latent
from rocm_attn_compile.testing import count_calls


def compiled(name: str, dynamic: bool | None = None, **options) -> Recorder:
    recorder = Recorder(lowering="eager", **options)
    program = PROGRAMS[name]
    torch.compile(program.function, backend=recorder, dynamic=dynamic, fullgraph=True)(*program.make())
    return recorder


# --- options ---


VERIFIED = [
    "concatenated",
    "written_into_slices",
    "two_einsums",
    "grown_cache",
    "static_cache",
    "paged",
    "deepseek_absorbed",
    "one_product",
    "deepseek_absorbed_prompt",
    "absorbed_speculation",
]


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_keeps_what_is_right(name: str):
    recorder = compiled(name, verify=True)
    assert recorder.calls == 1, rocm_attn_compile.reports()[-1]
    assert not codes()


@pytest.mark.parametrize("name", ["concatenated", "deepseek_absorbed_prompt"])
def test_verify_of_a_training_graph(name: str):
    program = PROGRAMS[name]
    recorder = Recorder(lowering="aot_eager", verify=True)
    inputs = [tensor.requires_grad_() for tensor in program.make()]
    torch.compile(program.function, backend=recorder, fullgraph=True)(*inputs).sum().backward()
    assert recorder.calls == 1, rocm_attn_compile.reports()[-1]


@pytest.mark.parametrize("name", ["concatenated", "grown_cache", "one_product"])
def test_verify_refuses_what_is_wrong(name: str, monkeypatch):
    """A latent whose tokens are in another order."""
    emit = rewrite_latent.emit_latent

    def emit_wrong(builder, region, latent, *rest):
        out = emit(builder, region, latent, *rest)
        return builder.call(torch.ops.aten.flip.default, out, [1])

    monkeypatch.setattr("rocm_attn_compile.rewrite.replace.emit_latent", emit_wrong)
    recorder = compiled(name, verify=True)
    assert recorder.calls == 0
    assert codes() == {"verify_failed"}


def test_no_fuel_leaves_the_graph_as_it_was():
    recorder = compiled("written_into_slices", fuel=0)
    assert codes() == {"no_fuel"}
    (graph,) = recorder.graphs
    assert recorder.calls == 0
    assert count_calls(graph)["setitem"] == 4


def test_strict_takes_it_as_chosen():
    assert compiled("concatenated", strict=True).calls == 1


def test_another_choice_is_another_impl():
    first, second = compiled("concatenated"), compiled("concatenated", inline=False)
    impls = [
        node.kwargs["impl"]
        for recorder in (first, second)
        for node in recorder.graphs[0].graph.nodes
        if "impl" in node.kwargs
    ]
    assert len(set(impls)) == 2
    assert all(impl.startswith("TRITON_MLA@") for impl in impls)


def test_a_defect_of_ours_leaves_the_plain_attention(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("broken")

    monkeypatch.setattr("rocm_attn_compile.recognize.latent.find_absorbed", broken)
    assert compiled("concatenated").calls == 1
    (site,) = sites()
    assert (site.kind, site.backend, [note.code for note in site.notes]) == (
        "attention",
        "TRITON_ATTN",
        ["internal_error"],
    )


# --- what is left in the graph ---


def test_the_absorbed_form_expands_nothing():
    """Neither kv_b_proj nor the concatenation of the keys is left: only the weights' views."""
    (graph,) = compiled("grown_cache").graphs
    calls = count_calls(graph)
    assert calls["linear"] == 2  # q and kv_a
    assert calls["cat"] == 4  # two rotary halves, two caches


def test_the_prefill_form_makes_no_key_of_both_halves():
    (graph,) = compiled("written_into_slices").graphs
    calls = count_calls(graph)
    assert calls["setitem"] == calls[".new_empty"] == 0
    assert calls["linear"] == 3


def test_an_expansion_that_is_returned_stays():
    def function(*inputs):
        x, w_q, _, w_kv_b, c, k_pe = inputs
        k_nope, v = expanded(c, w_kv_b)
        return one_token(x, w_q, w_kv_b, c, k_pe), k_nope.sum()

    check(function, step, calls=1)


def test_a_cache_that_is_written_after_the_attention():
    """The op must read the latents that the attention read."""

    def function(x, w_q, w_kv_a, w_kv_b, c_cache, pe_cache):
        out = one_token(x, w_q, w_kv_b, c_cache, pe_cache)
        c, k_pe = latents(x, w_kv_a)
        c_cache[:, 3:4] = c
        pe_cache[:, 3:4] = k_pe
        return out, one_token(x, w_q, w_kv_b, c_cache, pe_cache)

    check(function, step, calls=2)


def test_latents_that_are_overwritten_before_the_attention():
    """The keys are there, and the latents are not (and too many to be kept): plain attention."""

    def function(x, w_q, w_kv_b, c_cache, k_pe):
        q_nope, q_pe = queries(x, w_q)
        k_nope, v = expanded(c_cache, w_kv_b)
        c_cache.zero_()
        k = torch.cat([k_nope, k_pe[:, None].expand(-1, H, -1, -1)], -1)
        return attend(torch.cat([q_nope, q_pe], -1), k, v, is_causal=False)

    def make(length: int = 3000):
        return rand(B, 1, X), w(H * (P + R), X), w(H * (P + E), C), rand(B, length, C), rand(B, length, R)

    check(function, make, calls=1)
    (site,) = sites()
    assert (site.kind, site.backend) == ("attention", "TRITON_ATTN")
    assert [note.code for note in site.notes] == ["latent_unavailable"]
    check(function, lambda: make(50), calls=1)  # few enough: a copy is made before they are overwritten
    assert sites()[0].kind == "mla"


# --- sizes, heads and weights ---


@pytest.mark.parametrize("heads", [1, 2, 5, 16, 128])
def test_head_counts(heads: int):
    def make():
        weights = w(heads * (P + R), X), w(C + R, X), w(heads * (P + E), C)
        return rand(B, 1, X), *weights, *step()[4:]

    def function(x, w_q, w_kv_a, w_kv_b, c, k_pe):
        return one_token(x, w_q, w_kv_b, c, k_pe)

    check(function, make, calls=1)
    assert sites()[0].data["num_heads"] == heads
    assert sites()[0].kind == "mla"


def test_keys_of_fewer_heads_than_queries():
    """Two heads of the latent's weights, each for three query heads."""

    def function(x, w_q, w_kv_a, w_kv_b):
        (q_nope, q_pe), (c, k_pe) = queries(x, w_q), latents(x, w_kv_a)
        k_nope, v = (_repeated(t) for t in expanded(c, w_kv_b))
        k = torch.cat([k_nope, k_pe[:, None].expand(-1, 6, -1, -1)], -1)
        return attend(torch.cat([q_nope, q_pe], -1), k, v)

    check(function, lambda: (rand(B, M, X), w(6 * (P + R), X), w(C + R, X), w(2 * (P + E), C)), calls=1, trains=True)
    assert sites()[0].replaced  # as a plain attention: which axes are batch is told by the layout, here wrongly


def _repeated(t):
    return t[:, :, None].expand(-1, -1, 3, -1, -1).reshape(t.shape[0], -1, t.shape[2], t.shape[3])


@pytest.mark.parametrize("name", ["deepseek_absorbed", "absorbed_step_with_a_length"])
def test_heads_of_one_query_are_heads(name: str):
    """All of them read one key, as many queries of one head would."""
    compiled(name)
    assert (sites()[-1].data["num_heads"], sites()[-1].data["q_len"]) == (H, 1)


def test_the_scale_is_the_one_of_the_scores():
    """Neither 1 / sqrt(P + R) nor that of the absorbed width."""
    compiled("with_q_lora_and_yarn")
    mscale = 0.1 * 0.707 * 3.689 + 1.0
    assert sites()[0].data["softmax_scale"] == pytest.approx((P + R) ** -0.5 * mscale * mscale)
    compiled("one_product")
    assert sites()[-1].data["softmax_scale"] == pytest.approx(SCALE)


# --- modes ---


@pytest.mark.parametrize("trains", [False, True])
def test_autocast(trains: bool):
    program = PROGRAMS["concatenated"]

    def function(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return program.function(*inputs)

    check(function, program.make, calls=1, trains=trains)
    assert (sites()[0].kind, sites()[0].data["dtype"]) == ("mla", "bf16")


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    program = PROGRAMS["concatenated"]
    pipeline = check(
        lambda *inputs: checkpoint(program.function, *inputs, use_reentrant=False), program.make, calls=1, trains=True
    )
    assert sites()[0].kind == "mla"
    assert any(count_calls(graph)["rocm_attn.mla_prefill"] for graph in pipeline.graphs)


def test_inductor():
    for name in ("concatenated", "grown_cache"):
        check(PROGRAMS[name].function, PROGRAMS[name].make, calls=1, lowering="inductor")
        assert sites()[0].kind == "mla"


# --- selection and report ---


def test_the_report_says_what_runs_and_why():
    compiled("grown_cache")
    text = str(rocm_attn_compile.reports()[-1])
    for words in (
        "latent attention (MLA), 3 heads of 10 (values of 5), latent 12 + rope 4 + nope 6",
        "TRITON_MLA: the default for MLA; not ROCM_AITER_MLA",
        "absorbed form: every head reads the latent itself (q_len 1 on kv_len 41 costs less over the latent",
        "block_size 16 of a paged cache, if there were one: TRITON_MLA takes any but 1",
        "on CPU tensors the op runs ATen",
    ):
        assert words in text
    (report,) = rocm_attn_compile.reports()
    assert type(report).from_json(report.to_json()) == report


def test_a_paged_cache_says_its_blocks():
    recorder = compiled("paged")
    assert sites()[0].data["latent"]["block_size"] == 16
    assert any("block_size 16 of the cache in the graph" in sentence for sentence in sites()[0].choice)
    (node,) = (n for n in recorder.graphs[0].graph.nodes if "mla_decode" in str(n.target))
    assert node.args[2].meta["example_value"].shape == (7, 16, C)
    assert node.args[4].meta["example_value"].dtype == torch.int32


@pytest.mark.parametrize(("num_blocks", "block_size"), [(7, 16), (9, None)])
def test_two_paged_caches(num_blocks: int, block_size: int | None):
    """The op reads blocks only where both caches have as many; else what is gathered is a contiguous latent."""

    def make():
        *inputs, table, lens = two_paged_caches(num_blocks)
        return *inputs, table.clamp(min=0), lens

    check(PROGRAMS["paged_in_two"].function, make, calls=1)
    assert sites()[0].data["latent"]["block_size"] == block_size


def test_a_mean_over_a_paged_cache_is_contiguous():
    """What a finite fill gives for a row without a key is a mean over all keys, of which blocks tell no number."""

    def function(x, w_q, w_kv_b, cache, table, lens):
        rows = cache[table].flatten(1, 2)
        q_nope, q_pe = queries(x, w_q)
        k_nope, v = expanded(rows[..., :C], w_kv_b)
        k = torch.cat([k_nope, rows[:, None, :, C:].expand(-1, H, -1, -1)], -1)
        scores = torch.cat([q_nope, q_pe], -1) @ k.mT * SCALE
        return scores.masked_fill(~written_so_far(rows.shape[1], lens), torch.finfo(scores.dtype).min).softmax(-1) @ v

    check(function, lambda: (*pages()[:5], torch.tensor([37, 0])), calls=1)
    assert (sites()[0].kind, sites()[0].data["latent"]["block_size"]) == ("mla", None)
    assert sites()[0].data["mask"]["empty_rows"] == "mean"


def single_rows(x, w_q, w_kv_b, cache, table, lens):
    rows = cache[table].view(x.shape[0], -1, C + R)
    return one_token(x, w_q, w_kv_b, rows[..., :C], rows[..., C:], written_so_far(rows.shape[1], lens))


def make_single_rows():
    x, w_q, w_kv_b, _, _, _ = pages()
    return x, w_q, w_kv_b, rand(30, 1, C + R), torch.randint(0, 30, (B, 24)), torch.tensor([24, 11])


@pytest.mark.filterwarnings("ignore:attention runs on TRITON_ATTN")
def test_blocks_of_one_row_are_not_triton_mlas():
    """The documented rule: block size 1 is ROCM_AITER_MLA's, which is not built, so it falls back, and says so."""
    check(single_rows, make_single_rows, calls=1, refused={"not_built", "package_missing", "dtype", "head_dim",
          "v_head_dim", "kv_end", "empty_rows_nan", "mla_dims", "mla_num_heads"})  # fmt: skip
    (site,) = sites()
    assert (site.kind, site.backend) == ("mla", "TRITON_ATTN")
    assert [reason.code for reason in site.rejected["TRITON_MLA"]] == ["block_size"]


def columns(q, cache):
    kv = cache[:, None]
    return attend(q, kv, kv[..., R:], is_causal=False)


def test_an_architecture_limits_the_sizes():
    """Named explicitly, the kernels' limits hold for CPU tensors, too."""

    def run(width: int, **options):
        torch._dynamo.reset()
        inputs = rand(B, H, M, width), rand(B, 9, width)
        torch.compile(columns, backend=Recorder(lowering="eager", **options), fullgraph=True)(*inputs)
        return sites()[-1]

    assert run(512 + R, arch="gfx942").backend == "TRITON_MLA"
    with pytest.warns(rocm_attn_compile.RocmAttnWarning, match="mla_latent"):
        site = run(528 + R, arch="gfx942")
    assert (site.kind, site.replaced) == ("mla", False)  # TRITON_ATTN has no heads of 532
    assert [reason.code for reason in site.rejected["TRITON_MLA"]] == ["v_head_dim", "mla_latent"]
    assert run(528 + R).backend == "TRITON_MLA"
    strict = pytest.raises(Exception, match="mla_latent")
    with strict, pytest.warns(rocm_attn_compile.RocmAttnWarning):
        run(528 + R, arch="gfx942", strict=True)


def test_a_general_backend_named_for_latent_attention_is_the_documented_error():
    with pytest.raises(Exception, match="not MLA type"):
        compiled("concatenated", attention_backend="TRITON_ATTN")


def test_explain():
    text = str(rocm_attn_compile.explain(PROGRAMS["one_product"].function)(*PROGRAMS["one_product"].make()))
    assert "absorbed form: every head reads the latent itself (the model is written in it)" in text
