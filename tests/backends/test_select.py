"""The choice for a site: the rules' backend if it can, else the next that can, with reasons, warnings and errors."""

import importlib
import itertools
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch

from rocm_attn_compile.backends import by_name, fingerprint
from rocm_attn_compile.backends.select import BackendUnavailableError, Choice, Rejected, StrictError, select
from rocm_attn_compile.env import AiterPackage, Environment, Flags, RocmAttnWarning
from rocm_attn_compile.options import Options
from rocm_attn_compile.reasons import Reason
from rocm_attn_compile.spec import AttentionSpec, MaskSpec

from .examples import EVERYTHING_INSTALLED, LATENT

# The package `backends.select` and the function in it share a name.
select_module = importlib.import_module("rocm_attn_compile.backends.select")

SPEC = AttentionSpec(2, 8, 2, 64, 64, 64, 64, torch.bfloat16, "cpu", 0.125, mask=MaskSpec(band_upper=0, text="causal"))
MLA_SPEC = replace(SPEC, num_heads=16, num_kv_heads=16, head_dim=192, v_head_dim=128, kind="mla", latent=LATENT)
TOO_WIDE = replace(SPEC, device="cuda", head_dim=512, v_head_dim=512)

NAMES = (
    "ROCM_AITER_UNIFIED_ATTN",
    "ROCM_AITER_FA",
    "ROCM_ATTN",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
    "ROCM_AITER_MLA",
    "TRITON_MLA",
)


def environment(flags=None, **values):
    flags = flags or {}
    arch = values.get("arch")
    return Environment(**{"arch_source": "option" if arch else "none", **values}, flags=Flags(**flags))


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RocmAttnWarning)
        yield


# --- The choice without a fallback ---


def test_default_is_triton_attn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = select(SPEC, environment(), Options())
    assert isinstance(choice, Choice)
    assert (choice.backend, choice.preferred, choice.fell_back, choice.reasons) == (
        "TRITON_ATTN",
        "TRITON_ATTN",
        False,
        [],
    )
    assert choice.impl.startswith("TRITON_ATTN@")
    assert choice.sentences == ("TRITON_ATTN: the default, no flag asks for another",)
    assert set(choice.rejected) == set(NAMES) - {"TRITON_ATTN"}
    assert all(choice.rejected.values()), "every other backend has a reason"


@pytest.mark.parametrize("by", ["variable", "option"])
def test_naming_it_is_the_same_choice_either_way(by):
    env = environment({"attention_backend": "TRITON_ATTN"} if by == "variable" else None)
    choice = select(SPEC, env, Options(attention_backend="TRITON_ATTN" if by == "option" else None))
    where = "VLLM_ATTENTION_BACKEND" if by == "variable" else 'options["attention_backend"]'
    assert choice.backend == "TRITON_ATTN"
    assert choice.sentences == (f"TRITON_ATTN: named by {where}",)


def test_where_both_are_set_the_environment_wins_with_a_warning():
    env = environment({"attention_backend": "TRITON_ATTN"})
    with pytest.warns(RocmAttnWarning, match=r"VLLM_ATTENTION_BACKEND=TRITON_ATTN overrides .*'ROCM_ATTN'"):
        choice = select(SPEC, env, Options(attention_backend="ROCM_ATTN"))
    assert choice.preferred == "TRITON_ATTN"


def test_where_both_say_the_same_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(SPEC, environment({"attention_backend": "TRITON_ATTN"}), Options(attention_backend="TRITON_ATTN"))


# --- The order, by brute force, with stand-ins that can or cannot take the site ---


@dataclass(frozen=True)
class StandIn:
    name: str
    able: bool

    def reasons(self, spec, env):
        return [] if self.able else [Reason("cannot", f"{self.name} cannot")]


def independent_order(flags, arch, name):
    """The order of the issue, stated once more: named, then what the flags enable, then the two general ones."""
    gfx9 = arch in {"gfx90a", "gfx942", "gfx950"}
    order = [name] if name else []
    order += ["ROCM_AITER_UNIFIED_ATTN"] * (flags["use_aiter"] and flags["use_aiter_unified"])
    order += ["ROCM_AITER_FA"] * (flags["use_aiter"] and flags["use_aiter_mha"] and gfx9)
    order += ["ROCM_ATTN"] * flags["prefill_decode"]
    return [*order, "TRITON_ATTN", "FLEX_ATTENTION"]


def test_the_first_in_order_that_can_is_chosen(monkeypatch, quiet):
    general = NAMES[:5]
    monkeypatch.setattr(select_module, "implementation_tag", lambda name, env, inline: f"{name}@0")
    tried = 0
    for able in itertools.product((False, True), repeat=len(general)):
        stand_ins = {name: StandIn(name, can) for name, can in zip(general, able)}
        monkeypatch.setattr(select_module, "BACKENDS", tuple(stand_ins.values()))
        monkeypatch.setattr(select_module, "by_name", stand_ins.__getitem__)
        for bits in itertools.product((False, True), repeat=4):
            flags = dict(zip(("use_aiter", "use_aiter_mha", "use_aiter_unified", "prefill_decode"), bits))
            for arch, name in itertools.product(("gfx942", "gfx1100"), (None, "ROCM_ATTN", "FLEX_ATTENTION")):
                env = environment({**flags, "attention_backend": name}, arch=arch)
                outcome = select(SPEC, env, Options())
                order = independent_order(flags, arch, name)
                possible = [candidate for candidate in order if stand_ins[candidate].able]
                assert outcome.preferred == order[0]
                if possible:
                    assert isinstance(outcome, Choice)
                    assert outcome.backend == possible[0]
                    assert outcome.fell_back is (possible[0] != order[0])
                    assert set(outcome.rejected) == set(general) - {possible[0]}
                    for other, reasons in outcome.rejected.items():
                        code = "lower_priority" if stand_ins[other].able else "cannot"
                        assert [reason.code for reason in reasons] == [code]
                else:
                    assert isinstance(outcome, Rejected)
                    assert set(outcome.rejected) == set(general)
                tried += 1
    assert tried == 32 * 16 * 6


# --- Fallback ---


@pytest.mark.parametrize(
    ("flags", "preferred"),
    [
        ({"attention_backend": "ROCM_ATTN"}, "ROCM_ATTN"),
        ({"attention_backend": "FLEX_ATTENTION"}, "FLEX_ATTENTION"),
        ({"prefill_decode": True}, "ROCM_ATTN"),
        ({"use_aiter": True}, "ROCM_AITER_FA"),
        ({"use_aiter": True, "use_aiter_unified": True}, "ROCM_AITER_UNIFIED_ATTN"),
    ],
)
def test_not_built_falls_back_with_its_reason_and_one_warning(flags, preferred):
    env = environment(flags, arch="gfx942")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        choices = [select(SPEC, env, Options()) for _ in range(3)]
    assert len(record) == 1
    assert f"TRITON_ATTN instead of {preferred}" in str(record[0].message)
    for choice in choices:
        assert (choice.backend, choice.preferred, choice.fell_back) == ("TRITON_ATTN", preferred, True)
        assert "not_built" in [reason.code for reason in choice.reasons]
        assert choice.sentences[0].startswith(preferred)
        assert choice.sentences[-1] == "TRITON_ATTN: the next in order that can"


def test_missing_aiter_chosen_by_flags_falls_back():
    with pytest.warns(RocmAttnWarning, match="package_missing"):
        choice = select(SPEC, environment({"use_aiter": True}, arch="gfx942"), Options())
    assert choice.backend == "TRITON_ATTN"
    assert "package_missing" in [reason.code for reason in choice.reasons]


def test_flags_that_enable_aiter_off_gfx9_change_nothing_and_say_so():
    choice = select(SPEC, environment({"use_aiter": True}), Options())
    assert not choice.fell_back
    assert "is not gfx9" in choice.sentences[0]


def test_two_kinds_of_sites_give_two_warnings_and_the_next_graph_warns_again():
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(2):
            env = environment({"attention_backend": "ROCM_ATTN"})
            for spec in (SPEC, replace(SPEC, logits_soft_cap=5.0), SPEC):
                select(spec, env, Options())
    assert len(record) == 4


def test_nothing_can_take_it():
    with pytest.warns(RocmAttnWarning, match=r"left as it is.*head_dim=512"):
        outcome = select(TOO_WIDE, environment(arch="gfx942"), Options())
    assert isinstance(outcome, Rejected)
    assert set(outcome.rejected) == set(NAMES)
    assert outcome.preferred == "TRITON_ATTN"
    assert outcome.reasons[0].code == "head_dim"
    assert outcome.reasons[0].text.startswith("TRITON_ATTN: head_dim=512")
    assert {reason.text.split(":")[0] for reason in outcome.reasons} == set(NAMES)


def test_mla_by_default():
    choice = select(MLA_SPEC, environment(), Options())
    assert (choice.preferred, choice.backend) == ("TRITON_MLA", "TRITON_MLA")
    assert "prefill form" in choice.sentences[1]
    assert "block_size 16" in choice.sentences[2]


def test_mla_with_block_size_1_falls_back_to_the_general_kernel():
    with pytest.warns(RocmAttnWarning):
        choice = select(MLA_SPEC, environment(block_size=1), Options())
    assert (choice.preferred, choice.backend) == ("ROCM_AITER_MLA", "TRITON_ATTN")
    assert [reason.code for reason in choice.rejected["TRITON_MLA"]] == ["block_size"]


@pytest.mark.parametrize(("paged", "option", "preferred"), [(1, 16, "ROCM_AITER_MLA"), (32, 1, "TRITON_MLA")])
def test_the_blocks_of_a_cache_in_the_graph_count_not_the_option(paged, option, preferred):
    spec = replace(MLA_SPEC, latent=replace(LATENT, form="absorbed", block_size=paged))
    with pytest.warns(RocmAttnWarning) if paged == 1 else nullcontext():
        choice = select(spec, environment(block_size=option), Options())
    assert choice.preferred == preferred


def test_what_triton_mla_does_not_take_falls_back_to_the_general_kernel():
    with pytest.warns(RocmAttnWarning, match="logits_soft_cap"):
        choice = select(replace(MLA_SPEC, logits_soft_cap=5.0), environment(), Options())
    assert (choice.preferred, choice.backend) == ("TRITON_MLA", "TRITON_ATTN")


def test_aiter_mla_is_chosen_and_falls_back_to_ours():
    env = environment({"use_aiter": True}, arch="gfx942", aiter=EVERYTHING_INSTALLED)
    with pytest.warns(RocmAttnWarning, match="not_built"):
        choice = select(MLA_SPEC, env, Options())
    assert (choice.preferred, choice.backend) == ("ROCM_AITER_MLA", "TRITON_MLA")


def test_aiter_triton_mla_is_accepted_and_falls_back():
    env = environment({"attention_backend": "ROCM_AITER_TRITON_MLA"}, arch="gfx942", aiter=EVERYTHING_INSTALLED)
    with pytest.warns(RocmAttnWarning, match="not_built"):
        choice = select(MLA_SPEC, env, Options())
    assert (choice.preferred, choice.backend) == ("ROCM_AITER_TRITON_MLA", "TRITON_MLA")


# --- Errors ---


@pytest.mark.parametrize(
    ("name", "spec", "error"),
    [
        ("triton_attn", SPEC, ValueError),
        ("", SPEC, ValueError),
        ("TRITON_MLA", SPEC, RuntimeError),
        ("FLASH_ATTN", SPEC, RuntimeError),
        ("TRITON_ATTN", MLA_SPEC, ValueError),
        ("ROCM_AITER_FA", SPEC, ValueError),
    ],
)
@pytest.mark.parametrize("by", ["variable", "option"])
def test_errors_of_the_rules(name, spec, error, by):
    env = environment({"attention_backend": name} if by == "variable" else None)
    with pytest.raises(error) as caught:
        select(spec, env, Options(attention_backend=name if by == "option" else None))
    assert type(caught.value) is error


def test_the_gpu_in_the_machine_does_not_make_aiter_fa_legal_for_cpu_tensors():
    env = environment({"attention_backend": "ROCM_AITER_FA"}, arch="gfx942", arch_source="device")
    with pytest.raises(ValueError, match="only supported on gfx9"):
        select(SPEC, env, Options())


@pytest.mark.parametrize(
    ("name", "spec", "values", "what"),
    [
        ("ROCM_AITER_UNIFIED_ATTN", SPEC, {}, "package aiter"),
        ("ROCM_AITER_FA", SPEC, {"arch": "gfx942"}, "package aiter"),
        ("ROCM_AITER_FA", SPEC, {"arch": "gfx942", "aiter": AiterPackage(location="/x/aiter")}, "unrelated"),
        ("ROCM_AITER_FA", SPEC, {"arch": "gfx90a", "aiter": EVERYTHING_INSTALLED}, "gfx90a"),
        ("ROCM_ATTN", SPEC, {"arch": "sm_90"}, "sm_90"),
        ("ROCM_AITER_MLA", MLA_SPEC, {"arch": "gfx942"}, "package aiter"),
        ("ROCM_AITER_MLA", MLA_SPEC, {"arch": "gfx1100", "aiter": EVERYTHING_INSTALLED}, "gfx1100"),
    ],
)
def test_a_named_backend_without_its_hardware_or_package_is_an_error(name, spec, values, what):
    with pytest.raises(BackendUnavailableError, match=what) as caught:
        select(spec, environment({"attention_backend": name}, **values), Options())
    assert "VLLM_ATTENTION_BACKEND" in str(caught.value)
    with pytest.raises(BackendUnavailableError, match=what):
        select(spec, environment(**values), Options(attention_backend=name))


def test_a_named_backend_that_is_only_not_built_is_no_error(quiet):
    env = environment({"attention_backend": "ROCM_AITER_FA"}, arch="gfx942", aiter=EVERYTHING_INSTALLED)
    assert select(SPEC, env, Options()).reasons == [
        Reason("not_built", "ROCM_AITER_FA is declared, but this version does not run it yet")
    ]


def test_strict_error_lists_everything():
    error = StrictError([("model.py:3", [Reason("a", "x"), Reason("b", "y")]), ("model.py:9", [Reason("c", "z")])])
    assert isinstance(error, NotImplementedError)
    assert [reason.code for reason in error.reasons] == ["a", "b", "c"]
    for part in ("strict", "model.py:3", "a: x", "b: y", "model.py:9", "c: z"):
        assert part in str(error)


# --- The impl string, which is in the compile caches' keys ---


def test_impl_changes_with_everything_it_depends_on(quiet, monkeypatch):
    def impl(flags=None, spec=SPEC, **values):
        return select(spec, environment(flags, **values), Options()).impl

    variants = [
        impl(),
        impl({"use_aiter": True}),
        impl({"use_aiter_mha": False}),
        impl({"use_aiter_unified": True}),
        impl({"use_aiter_mla": False}),
        impl({"prefill_decode": True}),
        impl({"attention_backend": "TRITON_ATTN"}),
        impl(arch="gfx942"),
        impl(arch="gfx950"),
        impl(block_size=16),
        impl(aiter=EVERYTHING_INSTALLED),
    ]
    monkeypatch.setattr(fingerprint, "package_version", lambda: "another")
    variants.append(impl())
    monkeypatch.setattr(fingerprint, "sources_digest", lambda: "another")
    variants.append(impl())
    assert len(set(variants)) == len(variants)
    assert all(variant.startswith("TRITON_ATTN@") for variant in variants)


def test_impl_is_stable():
    first, second = (select(SPEC, environment(arch="gfx942"), Options()).impl for _ in range(2))
    assert first == second
    assert select(replace(SPEC, q_len=7, kv_len=7), environment(arch="gfx942"), Options()).impl == first


def test_sources_digest_sees_every_source_and_not_the_place(tmp_path, monkeypatch):
    def digest(folder):
        monkeypatch.setattr(fingerprint, "_folders", lambda: [folder])
        fingerprint.sources_digest.cache_clear()
        return fingerprint.sources_digest()

    def make(folder, files):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    files = {"a.py": "1", "triton/b.py": "2", "triton/configs/gfx942.json": "{}", "hip/c.hip": "3", "hip/d.h": "4"}
    try:
        original = digest(make(tmp_path / "one", files))
        assert digest(make(tmp_path / "two", {**files, "notes.txt": "ignored", "__pycache__/a.pyc": "x"})) == original
        for number, name in enumerate(files):
            assert digest(make(tmp_path / f"changed{number}", {**files, name: "changed"})) != original, name
        renamed = {"aa.py" if name == "a.py" else name: text for name, text in files.items()}
        assert digest(make(tmp_path / "renamed", renamed)) != original
    finally:
        fingerprint.sources_digest.cache_clear()


def test_sources_digest_covers_the_op_and_the_kernels():
    names = {folder.name for folder in fingerprint._folders()}
    assert {"ops", "kernels"} <= names


def test_declared_names_resolve():
    for name in NAMES:
        assert by_name(name).name == name
