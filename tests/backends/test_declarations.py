"""Every declaration: all it takes is taken, and every single violation gives its own reason code."""

from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from rocm_attn_compile.backends import BACKENDS, EXTRA_BACKENDS, base, by_name, tables
from rocm_attn_compile.backends.base import BASE_CODES, Dims
from rocm_attn_compile.backends.features import FEATURE_CODES, FEATURES, KNOWN_FIELDS
from rocm_attn_compile.env import AiterPackage, Environment
from rocm_attn_compile.spec import AttentionSpec, EmptyRows, MaskSpec

from .examples import FEATURE_EXAMPLES, LIMIT_EXAMPLES, SYMBOL, good_env, taken_spec, with_mask

# What is not built can take nothing, so the declarations are tested as if they were.
BUILT = [replace(backend, built=True) for backend in BACKENDS + EXTRA_BACKENDS]
each_backend = pytest.mark.parametrize("backend", BUILT, ids=lambda backend: backend.name)
PAIRED_DIMS = ("mla_dims",)


def codes(backend, spec, env=None):
    return {reason.code for reason in backend.reasons(spec, env or good_env(backend))}


def test_seven_names_in_order():
    assert [backend.name for backend in BACKENDS] == [
        "ROCM_AITER_UNIFIED_ATTN",
        "ROCM_AITER_FA",
        "ROCM_ATTN",
        "TRITON_ATTN",
        "FLEX_ATTENTION",
        "ROCM_AITER_MLA",
        "TRITON_MLA",
    ]
    assert all(by_name(backend.name) is backend for backend in BACKENDS + EXTRA_BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS + EXTRA_BACKENDS, ids=lambda backend: backend.name)
def test_not_built_is_said_and_is_all_there_is_to_say(backend):
    expected = set() if backend.built else {"not_built"}
    assert codes(backend, taken_spec(backend)) == expected


def test_our_triton_kernels_are_built():
    assert [backend.name for backend in BACKENDS if backend.built] == ["TRITON_ATTN", "TRITON_MLA"]


# --- What is taken ---


@each_backend
def test_takes_every_dtype_size_kind_and_arch(backend):
    spec = taken_spec(backend)
    for dtype in backend.dtypes:
        assert not codes(backend, replace(spec, dtype=dtype))
    for kind in backend.kinds:
        assert not codes(backend, replace(spec, kind=kind))
    for head_dim, v_head_dim in accepted_dims(backend):
        assert not codes(backend, replace(spec, head_dim=head_dim, v_head_dim=v_head_dim)), (head_dim, v_head_dim)
    for pattern in backend.archs:
        for arch in {"*": ("gfx90a", "gfx1201", "sm_90"), "gfx*": ("gfx90a", "gfx1201")}.get(pattern, (pattern,)):
            assert not codes(backend, spec, good_env(backend, arch=arch, device_arch=arch))


def accepted_dims(backend):
    if any(limit.code in PAIRED_DIMS for limit in backend.limits):
        return [(576, 512), (192, 128)]
    dims = backend.head_dims
    values = dims.listed or (dims.low, dims.low + dims.multiple, dims.high or 512)
    return [(dim, min(dim, backend.v_head_dims.high or dim)) for dim in values]


@each_backend
def test_takes_every_feature_it_declares_alone_and_in_pairs(backend):
    spec = taken_spec(backend)
    # With MLA's fixed pairs of sizes, the plain spec has the feature already.
    skipped = {"v_head_dim_differs"} if any(limit.code in PAIRED_DIMS for limit in backend.limits) else set()
    taken = sorted(backend.takes - skipped)
    for code in taken:
        assert not codes(backend, FEATURE_EXAMPLES[code](spec)), code
    limit_codes = {limit.code for limit in backend.limits}
    for first, second in combinations(taken, 2):
        found = codes(backend, FEATURE_EXAMPLES[second](FEATURE_EXAMPLES[first](spec)))
        # A pair may break a limit, which is what limits are for; it never brings up another feature or field.
        assert found <= limit_codes, (first, second, found)


@pytest.mark.parametrize("backend", [b for b in BUILT if b.takes >= FEATURE_CODES], ids=lambda b: b.name)
def test_a_backend_that_takes_everything_takes_all_at_once(backend):
    spec = replace(
        taken_spec(backend),
        num_kv_heads=4,
        v_head_dim=8,
        logits_soft_cap=1.0,
        has_bias=True,
        has_alibi=True,
        bias_requires_grad=True,
        has_sinks=True,
        dropout_p=0.5,
        requires_grad=True,
        softmax_scale=-1.0,
        mask=MaskSpec(-3, 0, True, True, True, True, True, EmptyRows.MEAN_ADDED, "all"),
    )
    assert not codes(backend, spec)


# --- What is refused ---


@each_backend
def test_each_feature_it_does_not_declare_is_its_own_reason(backend):
    for feature in FEATURES:
        if feature.code not in backend.takes:
            found = codes(backend, FEATURE_EXAMPLES[feature.code](taken_spec(backend)))
            # A size that is not in the declaration's list is a second reason.
            extra = {"v_head_dim"} if feature.code == "v_head_dim_differs" else set()
            limits = {"mla_num_heads"} if feature.code == "symbolic_heads" else set()
            assert feature.code in found
            assert found <= {feature.code} | extra | limits, feature.code


def test_feature_examples_show_exactly_their_feature():
    """Otherwise the tests above could pass for the wrong reason."""
    assert set(FEATURE_EXAMPLES) == FEATURE_CODES
    plain = replace(taken_spec(by_name("TRITON_ATTN")), mask=MaskSpec())
    assert not [feature.code for feature in FEATURES if feature.values(plain)]
    for code, change in FEATURE_EXAMPLES.items():
        shown = [feature.code for feature in FEATURES if feature.values(change(plain))]
        allowed = {code} | ({"band_upper"} if code in ("decode", "symbolic_lengths") else set())
        assert code in shown
        assert set(shown) <= allowed, code


@each_backend
def test_each_limit_is_its_own_reason(backend):
    for limit in backend.limits:
        for change, env_changes in LIMIT_EXAMPLES[limit.code]:
            spec = change(taken_spec(backend))
            found = codes(backend, spec, good_env(backend, **env_changes))
            # Not causal enough for one limit can be a window of the wrong alignment for the other.
            related = {"causal_bottom_right", "window_bottom_right"}
            assert limit.code in found
            assert found <= {limit.code} | (related if limit.code in related else set()), (limit.code, found)


def test_every_limit_has_examples():
    assert {limit.code for backend in BACKENDS for limit in backend.limits} == set(LIMIT_EXAMPLES)


@each_backend
def test_single_violations_of_values(backend):
    spec = taken_spec(backend)
    violations = {
        "dtype": [replace(spec, dtype=dtype) for dtype in (torch.float64, torch.int32)],
        "head_ratio": [replace(spec, num_heads=16, num_kv_heads=3), replace(spec, num_kv_heads=0)],
        "softmax_scale": [replace(spec, softmax_scale=value) for value in (float("inf"), float("nan"))],
        "dropout_p": [replace(spec, dropout_p=value) for value in (1.0, -0.1)],
        "device": [replace(spec, device="mps")],
        "kind": [replace(spec, kind=kind) for kind in {"attention", "mla"} - backend.kinds],
        "symbolic_head_dim": [replace(spec, head_dim=SYMBOL)],
        "symbolic_v_head_dim": [replace(spec, v_head_dim=SYMBOL)],
        "head_dim": [replace(spec, head_dim=dim, v_head_dim=dim) for dim in outside(backend.head_dims)],
        "v_head_dim": [replace(spec, v_head_dim=dim) for dim in outside(backend.v_head_dims)],
    }
    related = {
        "head_ratio": {"gqa"},
        "softmax_scale": {"negative_scale"},  # NaN is not positive either
        "dropout_p": {"dropout"},
        "symbolic_head_dim": {"v_head_dim_differs", *PAIRED_DIMS},
        "symbolic_v_head_dim": {"v_head_dim_differs", *PAIRED_DIMS},
        "head_dim": {"v_head_dim", *PAIRED_DIMS},
        "v_head_dim": {"v_head_dim_differs", *PAIRED_DIMS},
    }
    for code, specs in violations.items():
        for bad in specs:
            found = codes(backend, bad)
            assert code in found, bad
            assert found <= {code} | related.get(code, set()), bad


def outside(dims: Dims):
    if dims.listed:
        return [max(dims.listed) + 1, min(dims.listed) - 1, min(dims.listed) // 2]
    candidates = [dims.low - 1, *([dims.high + 1] if dims.high else [])]
    return [dim for dim in candidates if dim > 0]


@each_backend
def test_single_violations_of_the_machine(backend):
    spec = taken_spec(backend)
    restricted = backend.archs != ("*",)
    for arch in ("gfx906", "gfx1100", "sm_90"):
        expected = set() if backend.runs_on(arch) else {"arch"}
        assert codes(backend, spec, good_env(backend, arch=arch, device_arch=arch)) == expected
    unknown = good_env(backend, arch=None, device_arch=None, arch_source="none")
    assert codes(backend, spec, unknown) == ({"arch"} if restricted else set())
    # Targeting a GPU that is not there is fine on CPU tensors, and not where its kernels would have to run.
    elsewhere = good_env(backend, device_arch="sm_90", arch_source="option")
    assert codes(backend, spec, elsewhere) == ({"device_arch"} if restricted else set())
    if backend.package == "aiter":
        for found in (AiterPackage(), AiterPackage(location="/somewhere/aiter")):
            assert codes(backend, spec, good_env(backend, aiter=found)) == {"package_missing"}


def test_missing_triton_is_a_reason_on_a_gpu_only(monkeypatch):
    backend = by_name("TRITON_ATTN")
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    spec = taken_spec(backend)
    assert codes(backend, spec) == {"package_missing"}
    assert codes(backend, replace(spec, device="cpu")) == set()


def test_all_reasons_at_once_with_values():
    reasons = by_name("ROCM_ATTN").reasons(
        replace(taken_spec(by_name("ROCM_ATTN")), head_dim=80, dtype=torch.float32, logits_soft_cap=50.0),
        Environment(arch="sm_90", arch_source="device", device_arch="sm_90"),
    )
    text = {reason.code: reason.text for reason in reasons}
    assert {"not_built", "arch", "head_dim", "v_head_dim_differs", "dtype", "logits_soft_cap"} <= set(text)
    assert "head_dim=80" in text["head_dim"]
    assert "32, 64, 96" in text["head_dim"]
    assert "fp32" in text["dtype"]
    assert "logits_soft_cap=50.0" in text["logits_soft_cap"]
    assert "sm_90" in text["arch"]


# --- CPU tensors ---


def test_cpu_tensors_run_atens_kernels_so_the_gpu_beside_them_does_not_count():
    for backend in BUILT:
        spec = replace(taken_spec(backend), device="cpu")
        assert not codes(backend, spec, good_env(backend, arch="sm_90", device_arch="sm_90"))
        explicit = good_env(backend, arch="sm_90", arch_source="option")
        assert codes(backend, spec, explicit) == (set() if backend.runs_on("sm_90") else {"arch"})


def test_triton_attn_takes_any_size_and_fp64_on_the_cpu_unless_a_gpu_is_targeted():
    backend = by_name("TRITON_ATTN")
    spec = replace(taken_spec(backend), device="cpu", dtype=torch.float64, head_dim=4, v_head_dim=300)
    assert not codes(backend, spec, Environment())
    targeted = Environment(arch="gfx942", arch_source="option")
    assert codes(backend, spec, targeted) == {"dtype", "head_dim", "v_head_dim"}
    assert codes(backend, replace(spec, device="cuda"), good_env(backend)) == {"dtype", "head_dim", "v_head_dim"}


# --- Default deny for what does not exist yet ---


@dataclass(frozen=True)
class NewerMask(MaskSpec):
    has_stripes: bool = False


@dataclass(frozen=True)
class NewerSpec(AttentionSpec):
    has_rotary: bool = False


@each_backend
def test_a_field_nobody_knows_is_a_reason(backend):
    plain = taken_spec(backend)
    values = {field.name: getattr(plain, field.name) for field in fields(AttentionSpec)}
    mask = {field.name: getattr(plain.mask, field.name) for field in fields(MaskSpec)}
    assert not codes(backend, NewerSpec(**{**values, "mask": NewerMask(**mask)}))
    assert codes(backend, NewerSpec(**values, has_rotary=True)) == {"unknown_field"}
    assert codes(backend, replace(plain, mask=NewerMask(**mask, has_stripes=True))) == {"unknown_field"}


def test_every_field_of_the_spec_is_checked():
    names = {field.name for field in fields(AttentionSpec)} | {f"mask.{field.name}" for field in fields(MaskSpec)}
    assert names == KNOWN_FIELDS


def test_every_feature_reads_what_it_says():
    """The fields it names, and only they, decide: else the check that every field is known would mean nothing."""
    plain = replace(taken_spec(by_name("TRITON_ATTN")), mask=MaskSpec())
    for feature in FEATURES:
        example = FEATURE_EXAMPLES[feature.code](plain)
        names = [name for name in feature.reads if not name.startswith("mask.")]
        mask_names = [name.removeprefix("mask.") for name in feature.reads if name.startswith("mask.")]
        mask = replace(plain.mask, **{name: getattr(example.mask, name) for name in mask_names})
        reduced = replace(plain, mask=mask, **{name: getattr(example, name) for name in names})
        assert feature.values(reduced), feature.code


# --- Windows and alignment, one by one ---


@pytest.mark.parametrize(
    ("lower", "upper", "takes"),
    [
        (None, 32, True),
        (32, 32, True),  # a window of 1: the diagonal alone
        (31, 32, True),
        (33, 32, False),  # starts right of the diagonal
        (0, 40, True),  # 8 keys after the diagonal: a right window
        (0, 31, False),
        (None, None, True),
    ],
)
def test_aiter_fa_windows(lower, upper, takes):
    backend = replace(by_name("ROCM_AITER_FA"), built=True)
    spec = with_mask(band_lower=lower, band_upper=upper)(taken_spec(backend))
    assert codes(backend, spec) == (set() if takes else {"window_bottom_right"})


@pytest.mark.parametrize(("q_len", "upper", "takes"), [(1, None, True), (1, 95, True), (2, None, False), (2, 94, True)])
def test_causal_decode_without_a_mask(q_len, upper, takes):
    backend = replace(by_name("ROCM_ATTN"), built=True)
    spec = replace(taken_spec(backend), q_len=q_len, mask=MaskSpec(band_upper=upper))
    assert codes(backend, spec) == (set() if takes else {"causal_bottom_right"})


# --- Codes and tables ---


def test_codes_do_not_collide():
    limits = {limit.code for backend in BACKENDS for limit in backend.limits}
    assert not FEATURE_CODES & limits
    assert not FEATURE_CODES & set(BASE_CODES)
    assert not limits & set(BASE_CODES)


def test_docs_are_current():
    path = Path(__file__).parents[2] / "docs" / "backends.md"
    assert path.read_text() == tables.markdown(), "run: rocm-attn backends --markdown > docs/backends.md"


def test_text_table_aligns():
    text = tables.text_table(("a", "bb"), [("ccc", "d"), ("e", "")])
    assert text == "a    bb\n---  --\nccc  d\ne"


def test_markdown_escapes_pipes():
    assert tables.markdown_table(("a",), [("b|c",)]) == "| a |\n| --- |\n| b\\|c |"
