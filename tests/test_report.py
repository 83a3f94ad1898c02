"""Reports: what they hold, how they read, the JSON round trip, the store and the logs; and explain."""

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import sympy
import torch

import rocm_attn_compile
from rocm_attn_compile import reports, reset_reports
from rocm_attn_compile.backends.select import select
from rocm_attn_compile.backends.words import mask_words, spec_data, words
from rocm_attn_compile.env import Environment, Flags, RocmAttnWarning
from rocm_attn_compile.explain import Explanation
from rocm_attn_compile.options import Options
from rocm_attn_compile.reasons import Reason
from rocm_attn_compile.report import Report, Site, collect_reports, publish
from rocm_attn_compile.spec import AttentionSpec, CacheSpec, EmptyRows, LatentSpec, MaskSpec

# The module's name is shadowed by the function of that name in the package.
explain_module = importlib.import_module("rocm_attn_compile.explain")

S0 = sympy.Symbol("s0", integer=True, positive=True)
CAUSAL = MaskSpec(band_upper=0, text="causal")
SPEC = AttentionSpec(1, 32, 8, 512, 512, 128, 128, torch.bfloat16, "cpu", 128**-0.5, mask=CAUSAL)


# --- Words ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "causal GQA attention, 32 query heads on 8 kv heads of 128, q_len 512, kv_len 512, bf16, scale 0.0884"),
        (
            {"num_kv_heads": 1, "batch": 3},
            "causal MQA attention, 32 query heads on 1 kv head of 128, batch 3, q_len 512, kv_len 512, bf16, "
            "scale 0.0884",
        ),
        (
            {"num_kv_heads": 32, "mask": MaskSpec(), "v_head_dim": 64, "dtype": torch.float32},
            "attention, 32 heads of 128 (values of 64), q_len 512, kv_len 512, fp32, scale 0.0884",
        ),
        (
            {"batch": S0, "q_len": 1, "kv_len": S0, "mask": MaskSpec(band_upper=S0 - 1, band_lower=S0 - 9)},
            "causal windowed GQA attention, 32 query heads on 8 kv heads of 128, batch s0, q_len 1, kv_len s0, bf16, "
            "scale 0.0884",
        ),
        (
            {"mask": MaskSpec(has_key_mask=True), "logits_soft_cap": 50.0, "has_bias": True, "has_sinks": True},
            "masked GQA attention, 32 query heads on 8 kv heads of 128, q_len 512, kv_len 512, bf16, scale 0.0884, "
            "soft cap 50, bias, learned sinks",
        ),
        (
            {"requires_grad": True, "dropout_p": 0.1, "has_bias": True, "bias_requires_grad": True, "kind": "mla"},
            "causal latent attention (MLA), 32 query heads on 8 kv heads of 128, q_len 512, kv_len 512, bf16, "
            "scale 0.0884, bias with gradient, dropout 0.1, training",
        ),
        (
            {"cache": CacheSpec(16, torch.float8_e4m3fn, True)},
            "causal GQA attention, 32 query heads on 8 kv heads of 128, q_len 512, kv_len 512, bf16, scale 0.0884, "
            "keys and values read from a cache in float8_e4m3fn in blocks of 16",
        ),
        (
            {"mask": MaskSpec(band_upper=3), "softmax_scale": 1.0},
            "masked GQA attention, 32 query heads on 8 kv heads of 128, q_len 512, kv_len 512, bf16, scale 1",
        ),
    ],
)
def test_words(changes, expected):
    assert words(replace(SPEC, **changes)) == expected


def test_mask_words():
    assert mask_words(MaskSpec()) == "none"
    assert mask_words(CAUSAL) == "causal (proved; every row keeps a key)"
    opaque = replace(CAUSAL, has_attn_mask=True, empty_rows=EmptyRows.NAN, text="causal, tensor")
    assert mask_words(opaque) == "causal, tensor (partly opaque: a tensor is left; a row without a key is NaN)"
    for mode in EmptyRows:
        assert mask_words(replace(CAUSAL, empty_rows=mode))


def test_spec_data_is_json_and_complete():
    data = spec_data(replace(SPEC, batch=S0, kv_len=2 * S0, mask=replace(CAUSAL, band_upper=S0)))
    assert json.loads(json.dumps(data)) == data
    assert (data["batch"], data["kv_len"], data["q_len"], data["mask"]["band_upper"]) == ("s0", "2*s0", 512, "s0")
    fields = set(AttentionSpec.__dataclass_fields__) - {"kind"}  # a site has its own `kind`
    assert set(data) == fields
    assert set(data["mask"]) == set(MaskSpec.__dataclass_fields__)
    latent = LatentSpec(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, block_size=S0)
    data = spec_data(replace(SPEC, latent=latent))["latent"]
    assert (data["kv_lora_rank"], data["block_size"]) == (512, "s0")
    assert set(data) == set(LatentSpec.__dataclass_fields__) - {"form_reason"}  # a sentence of the choice


# --- Sites and reports ---


def make_site(spec=SPEC, flags=None, **place):
    env = Environment(flags=Flags(**(flags or {})))
    return Site.recognized(spec, select(spec, env, Options()), **{"source": "model.py:7", "code": "p @ v", **place})


def make_report():
    with pytest.warns(RocmAttnWarning):
        fallen_back = make_site(flags={"attention_backend": "ROCM_ATTN"}, source="model.py:9")
    with pytest.warns(RocmAttnWarning):
        rejected = make_site(replace(SPEC, device="cuda", head_dim=512, v_head_dim=512), source="model.py:11")
    refused = Site.refused(Reason("softmax_over_heads", "the softmax axis is the heads"), source="other.py:3")
    environ = {"VLLM_ATTENTION_BACKEND": "ROCM_ATTN"}
    env = Environment.current(Options(arch="gfx942"), environ)
    report = Report.of("0/1", env, Options(arch="gfx942", fuel=7))
    report.sites = [make_site(module=f"layers.{i}") for i in range(3)] + [fallen_back, rejected]
    report.look_alikes = [refused]
    report.timings = {"capture": 0.25}
    report.notes = ["a note"]
    return report


def test_site_of_a_choice():
    site = make_site()
    assert (site.kind, site.replaced, site.backend, site.reasons) == ("attention", True, "TRITON_ATTN", [])
    assert (site.source, site.code) == ("model.py:7", "p @ v")
    assert site.spec.startswith("causal GQA attention")
    assert site.mask.startswith("causal (proved")
    assert site.impl.startswith("TRITON_ATTN@")
    assert site.choice == ["TRITON_ATTN: the default, no flag asks for another"]
    assert "not_built" in [reason.code for reason in site.rejected["ROCM_ATTN"]]
    assert make_site(replace(SPEC, kind="attention")).data["num_heads"] == 32


def test_sites_of_a_fallback_a_rejection_and_a_refusal():
    _, _, _, fallen_back, rejected = make_report().sites
    assert (fallen_back.replaced, fallen_back.backend) == (True, "TRITON_ATTN")
    assert [reason.code for reason in fallen_back.reasons] == ["not_built"]
    assert (rejected.replaced, rejected.backend, rejected.impl) == (False, None, "")
    assert rejected.reasons[0].code == "head_dim"
    (refused,) = make_report().look_alikes
    assert (refused.replaced, refused.backend, refused.spec) == (False, None, "")
    assert [reason.code for reason in refused.reasons] == ["softmax_over_heads"]


def test_json_round_trip():
    report = make_report()
    again = Report.from_json(report.to_json())
    assert again == report
    assert isinstance(again.sites[3].reasons[0], Reason)
    assert str(again) == str(report)
    data = json.loads(report.to_json())
    assert set(data["sites"][0]) >= {"kind", "replaced", "backend", "reasons", "source"}
    assert set(data["sites"][3]["reasons"][0]) == {"code", "text"}


def test_summary_counts():
    summary = make_report().summary()
    assert summary.startswith("graph 0/1: 5 attention sites: 4 TRITON_ATTN, 1 left as it is (head_dim")
    assert summary.endswith("; 1 look-alike refused (softmax_over_heads)")
    assert Report(graph="2/0").summary() == "graph 2/0: 0 attention sites"


def test_text_says_everything_and_groups_equal_layers():
    text = str(make_report())
    for part in (
        "target gfx942 (option)",
        "variables VLLM_ATTENTION_BACKEND=ROCM_ATTN",
        "options arch='gfx942', fuel=7",
        "attention 0-2: replaced by TRITON_ATTN",
        "in layers.0 and 2 more",
        "at model.py:7  p @ v",
        "causal GQA attention, 32 query heads on 8 kv heads of 128",
        "mask: causal (proved",
        "because TRITON_ATTN: the default",
        "attention 3: replaced by TRITON_ATTN",
        "reason not_built: ROCM_ATTN",
        "attention 4: left as it is",
        "reason head_dim: TRITON_ATTN: head_dim=512; takes 8 to 256",
        "not ROCM_ATTN: not_built",
        "look-alike 0: left as it is",
        "reason softmax_over_heads: the softmax axis is the heads",
        "note: a note",
        "time: capture 0.250 s",
    ):
        assert part in text, part
    assert text.count("at model.py:7") == 1


def test_ranges_of_interleaved_groups():
    report = Report(sites=[make_site(), make_site(replace(SPEC, q_len=1)), make_site(), make_site()])
    assert "attention 0, 2-3: " in str(report)
    assert "attention 1: " in str(report)


def test_clearing_replaced_is_seen():
    report = Report(sites=[make_site()])
    site = report.sites[0]
    site.replaced, site.backend = False, None
    site.reasons.insert(0, Reason("no_fuel", "used up"))
    assert report.summary() == "graph ?: 1 attention site: 1 left as it is (no_fuel)"


# --- Store and logs ---


def test_store():
    reset_reports()
    first, second = Report(graph="0"), Report(graph="1")
    publish(first)
    publish(second)
    assert reports() == [first, second]
    reports().clear()
    assert len(reports()) == 2, "the caller's list is a copy"
    reset_reports()
    assert reports() == []


def test_store_from_many_threads():
    reset_reports()
    threads = [threading.Thread(target=lambda: [publish(Report()) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports()) == 400
    reset_reports()


def test_collected_reports_are_not_stored():
    reset_reports()
    with collect_reports() as collected:
        publish(Report(graph="inside"))
    publish(Report(graph="outside"))
    assert [report.graph for report in collected] == ["inside"]
    assert [report.graph for report in reports()] == ["outside"]


def test_log_levels(caplog):
    with caplog.at_level(logging.DEBUG, logger="rocm_attn_compile"):
        publish(make_report())
    by_level = {record.levelno: record.getMessage() for record in caplog.records if "report" in record.name}
    assert by_level[logging.INFO] == make_report().summary()
    assert "attention 0-2: replaced by TRITON_ATTN" in by_level[logging.DEBUG]


def test_report_is_an_artifact_of_torch_trace(monkeypatch):
    artifacts = []
    monkeypatch.setattr(
        rocm_attn_compile._torch_private, "trace_artifact", lambda name, payload: artifacts.append((name, payload()))
    )
    report = make_report()
    publish(report)
    assert [(name, Report.from_json(text)) for name, text in artifacts] == [("rocm_attn_report", report)]


# --- explain ---


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1) @ v


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.proj(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return attention(q, k, v)


def tensors(n=3):
    return [torch.randn(1, 2, 6, 16) for _ in range(n)]


def test_explain_reports_sites_with_source_and_leaves_the_store_alone():
    reset_reports()
    explanation = rocm_attn_compile.explain(attention)(*tensors())
    assert len(explanation.reports) == 1
    (site,) = explanation.sites
    assert (site.kind, site.replaced, site.backend, site.reasons) == ("attention", True, "TRITON_ATTN", [])
    file, _, line = site.source.rpartition(":")
    assert file == __file__
    assert int(line) == attention.__code__.co_firstlineno + 1
    assert site.code == "return torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1) @ v"
    assert "2 heads of 16, q_len 6, kv_len 6, fp32, scale 0.25" in site.spec
    assert reports() == []


def test_explain_text_and_json():
    explanation = rocm_attn_compile.explain(attention)(*tensors())
    text = str(explanation)
    assert text.startswith("1 graph(s), 0 graph break(s), 1 attention site(s), 1 replaced")
    assert "attention 0: replaced by TRITON_ATTN" in text
    assert Explanation.from_json(explanation.to_json()) == explanation


def test_explain_a_module_with_options():
    explain = rocm_attn_compile.explain(Model(), options={"arch": "gfx942", "max_autotune": False}, dynamic=True)
    explanation = explain(torch.randn(2, 5, 16))
    (site,) = explanation.sites
    assert explanation.reports[0].environment["arch"] == "gfx942"
    assert explanation.reports[0].options["arch"] == "gfx942"
    assert site.replaced
    assert isinstance(site.data["q_len"], str), "dynamic"


def test_explain_refused_look_alike_has_a_reason():
    def softmax_over_queries(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2), dim=-2) @ v

    explanation = rocm_attn_compile.explain(softmax_over_queries)(*tensors())
    found = explanation.sites + explanation.look_alikes
    assert len(found) == 1
    assert not found[0].replaced
    assert found[0].reasons


def test_explain_shows_graph_breaks():
    def broken(q, k, v):
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(out, k, v)

    explanation = rocm_attn_compile.explain(broken)(*tensors())
    assert len(explanation.reports) == 2
    assert len(explanation.graph_breaks) == 1
    assert len(explanation.sites) == 2
    assert "graph break: " in str(explanation)


def test_explain_leaves_compiled_code_compiled():
    compilations = []

    def backend(gm, inputs):
        compilations.append(gm)
        return gm.forward

    compiled = torch.compile(attention, backend=backend)
    inputs = tensors()
    compiled(*inputs)
    # What torch.compile wrapped is explained as the function under it, also more often than the recompile limit.
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            assert len(rocm_attn_compile.explain(compiled)(*inputs).sites) == 1
    compiled(*inputs)
    assert len(compilations) == 1


@pytest.mark.parametrize("wrap", ["torch.compile", "module.compile"])
def test_explain_a_compiled_module(wrap):
    def backend(gm, inputs):
        raise AssertionError("explain ran the compiled module")

    module = Model()
    if wrap == "torch.compile":
        module = torch.compile(module, backend=backend)
    else:
        module.compile(backend=backend)
    assert len(rocm_attn_compile.explain(module)(torch.randn(2, 5, 16)).sites) == 1


def test_explain_passes_on_what_it_is_given(monkeypatch):
    seen = []

    def compile_graph(graph_module, example_inputs, **settings):
        seen.append(settings)
        publish(Report(graph="stub"))
        return graph_module.forward

    monkeypatch.setattr(explain_module, "compile_graph", compile_graph)
    explanation = rocm_attn_compile.explain(attention, options={"strict": True}, mode="max-autotune")(*tensors())
    assert seen == [{"options": {"strict": True}, "mode": "max-autotune", "lowering": "eager"}]
    assert [report.graph for report in explanation.reports] == ["stub"]


def test_explain_does_not_swallow_errors():
    with pytest.raises(Exception, match="unknown option 'stric'"):
        rocm_attn_compile.explain(attention, options={"stric": True})(*tensors())


def test_torch_logs_shows_reports(tmp_path):
    program = (
        "import torch, rocm_attn_compile\n"
        "qkv = torch.ones(3, 1, 2, 6, 16)\n"
        "rocm_attn_compile.explain(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v)(*qkv.clone())\n"
    )
    environ = {**os.environ, "TORCH_LOGS": "+rocm_attn_compile"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    # Levels are the first letter of a line: INFO has the summary, DEBUG (V) the whole report.
    assert sum(line.startswith("I") and "graph 0/0: 1 attention site" in line for line in lines) == 1
    assert any(line.startswith("V") and "attention 0: replaced by TRITON_ATTN" in line for line in lines)
