"""What is nearly latent attention stays a plain one: replaced, right, and with the reason in the report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from latent_programs import prefill
from near_misses import NEAR_MISSES, NearMiss, with_dropout
from pipeline_harness import check, sites
from recorder import Recorder

import rocm_attn_compile
from rocm_attn_compile.testing import count_calls


@pytest.mark.parametrize("near", NEAR_MISSES.values(), ids=lambda n: n.name)
def test_it_stays_a_plain_attention(near: NearMiss):
    pipeline = check(near.function, near.make, calls=1, trains=near.trains)
    (site,) = sites()
    assert (site.kind, site.backend) == ("attention", "TRITON_ATTN")
    codes = [note.code for note in site.notes if note.code != "bias_is_input"]
    assert codes == ([] if near.code is None else [near.code])
    assert not any(name.startswith("rocm_attn.mla") for graph in pipeline.graphs for name in count_calls(graph))


def test_the_note_is_in_the_text_and_the_json():
    check(NEAR_MISSES["two_latents"].function, NEAR_MISSES["two_latents"].make, calls=1)
    (report,) = rocm_attn_compile.reports()
    assert "note latent_differs: keys and values are expanded from different latents" in str(report)
    assert type(report).from_json(report.to_json()) == report


def test_a_note_on_a_cache_names_what_would_make_it_latent():
    near = NEAR_MISSES["static_cache_of_expanded_keys"]
    check(near.function, near.make, calls=1)
    assert "use_latent_cache" in sites()[0].notes[0].text


def test_dropout_of_the_weights():
    recorder = Recorder(lowering="eager")
    torch.compile(with_dropout, backend=recorder, fullgraph=True)(*prefill())
    (site,) = sites()
    assert (site.kind, site.replaced, [note.code for note in site.notes]) == ("attention", True, ["latent_dropout"])


def test_every_code_is_documented():
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "recognition.md").read_text()
    sources = (root / "rocm_attn_compile" / "recognize").glob("*.py")
    codes = {code for path in sources for code in re.findall(r'"(latent_[a-z_]+)"', path.read_text())}
    assert len(codes) > 15
    never_reported = {"latent_full_rank", "latent_symbolic", "latent_note"}  # ordinary attention; a field's name
    assert {code for code in codes - never_reported if f"`{code}`" not in text} == set()
