"""`rocm-attn`: the text and the JSON of each command, and its errors."""

import json
import os
import subprocess
import sys

import pytest

from rocm_attn_compile import cli
from rocm_attn_compile.backends import BACKENDS, tables
from rocm_attn_compile.env import RocmAttnWarning


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = cli.main(arguments)
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run


def test_backends_text_is_made_from_the_declarations(run):
    text = run("backends")
    overview, matrix, limits = text.split("\n\n")
    assert [line.split()[0] for line in overview.splitlines()[2:]] == [backend.name for backend in BACKENDS]
    assert "TRITON_ATTN              yes " in overview
    assert "ROCM_ATTN                not yet " in overview
    dropout = next(line.split() for line in matrix.splitlines() if line.startswith("dropout "))
    header = matrix.splitlines()[0].split()
    assert [name for name, cell in zip(header, dropout) if cell == "yes"] == ["TRITON_ATTN"]
    assert "ROCM_AITER_MLA: 16 or 128 query heads (mla_num_heads)" in limits


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("gfx942", [backend.name for backend in BACKENDS]),
        ("gfx1100", ["ROCM_AITER_UNIFIED_ATTN", "ROCM_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "TRITON_MLA"]),
        ("sm_90", ["TRITON_ATTN", "FLEX_ATTENTION", "TRITON_MLA"]),
    ],
)
def test_backends_of_an_architecture(run, arch, names):
    assert [entry["name"] for entry in json.loads(run("backends", "--arch", arch, "--json"))] == names
    text = run("backends", "--arch", arch)
    assert [line.split()[0] for line in text.split("\n\n")[0].splitlines()[2:]] == names
    assert text.split("\n\n")[1].splitlines()[0].split() == ["feature", *names]


def test_backends_json_is_complete(run):
    data = json.loads(run("backends", "--json"))
    for entry, backend in zip(data, BACKENDS):
        assert entry["built"] is backend.built
        assert set(entry["takes"]) == backend.takes
        assert not set(entry["takes"]) & set(entry["refuses"])
        assert set(entry["limits"]) == {limit.code for limit in backend.limits}


def test_backends_markdown_is_the_docs_page(run):
    assert run("backends", "--markdown") == tables.markdown()


def test_env_text_and_json(run, monkeypatch):
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "1")
    monkeypatch.setenv("ROCM_ATTN_ARCH", "gfx942")
    monkeypatch.setenv("VLLM_ROCM_USE_AITTER", "1")  # misspelt: shown, so that the reader of a bug report sees it
    text = run("env")
    data = json.loads(run("env", "--json"))
    assert "target: gfx942 (from variable)" in text
    for name in ("torch", "python", "triton", "aiter", "gpu", "platform"):
        assert f"\n{name}: " in f"\n{text}"
    assert "  VLLM_ROCM_USE_AITER=1\n" in text
    assert data["arch"] == "gfx942"
    assert data["variables"] == {
        "ROCM_ATTN_ARCH": "gfx942",
        "VLLM_ROCM_USE_AITER": "1",
        "VLLM_ROCM_USE_AITTER": "1",
    }


def test_select_says_what_and_why(run):
    text = run(
        "select", "--arch", "gfx942", "--num-kv-heads", "8", "--q-len", "1", "--kv-len", "4096", "--window", "128"
    )
    assert text.splitlines()[:5] == [
        "causal windowed GQA attention, 32 query heads on 8 kv heads of 128, q_len 1, kv_len 4096, bf16, scale 0.0884",
        "mask: causal and window 128 (proved; every row keeps a key)",
        "target: gfx942",
        "backend: TRITON_ATTN",
        "because TRITON_ATTN: the default, no flag asks for another",
    ]
    assert "not ROCM_ATTN:\n  not_built: " in text


def test_select_json_reads_the_environment(run, monkeypatch):
    monkeypatch.setenv("VLLM_V1_USE_PREFILL_DECODE_ATTENTION", "1")
    with pytest.warns(RocmAttnWarning, match="not_built"):
        data = json.loads(run("select", "--arch", "gfx942", "--soft-cap", "30", "--causal", "--json"))
    assert (data["backend"], data["preferred"]) == ("TRITON_ATTN", "ROCM_ATTN")
    assert {reason["code"] for reason in data["rejected"]["ROCM_ATTN"]} == {"not_built", "logits_soft_cap"}
    assert data["spec"]["logits_soft_cap"] == 30.0


def test_select_of_latent_attention_names_no_reason_that_it_has_not(run):
    text = run("select", "--arch", "gfx942", "--mla", "--head-dim", "192", "--v-head-dim", "128")
    assert "because prefill form: the keys are not put together with k_pe\n" in text


def test_select_where_nothing_can(run):
    with pytest.warns(RocmAttnWarning):
        text = run("select", "--arch", "gfx942", "--head-dim", "512")
    assert "backend: none, left as it is" in text
    assert "head_dim: head_dim=512; takes 8 to 256" in text


def test_select_every_spec_argument_arrives(run):
    line = (
        "--arch gfx942 --dtype fp32 --batch 3 --num-heads 8 --num-kv-heads 2 --head-dim 64 --v-head-dim 32 --q-len 5 "
        "--kv-len 7 --scale 0.5 --window 4 --soft-cap 9 --score-floor=-5 --bias --alibi --sinks --dropout 0.1 "
        "--training --weights --json --kv-block-size 16 --kv-dtype float8_e5m2"
    )
    spec = json.loads(run("select", *line.split()))["spec"]
    mask = spec.pop("mask")
    assert spec == {
        "batch": 3,
        "num_heads": 8,
        "num_kv_heads": 2,
        "q_len": 5,
        "kv_len": 7,
        "head_dim": 64,
        "v_head_dim": 32,
        "dtype": "fp32",
        "device": "cuda",
        "softmax_scale": 0.5,
        "logits_soft_cap": 9.0,
        "score_floor": -5.0,
        "has_bias": True,
        "has_alibi": True,
        "bias_requires_grad": True,
        "has_sinks": True,
        "dropout_p": 0.1,
        "requires_grad": True,
        "returned_weights": "impossible",
        "latent": None,
        "cache": {"block_size": 16, "dtype": "float8_e5m2", "has_scale": True},
    }
    assert (mask["band_upper"], mask["band_lower"]) == (2, -1)  # 4 keys: k - q from 2 - 3 to 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select", "--backend", "triton"], "Invalid value 'triton'"),
        (["select", "--backend", "TRITON_MLA"], "not supported on ROCm"),
        (["select", "--backend", "ROCM_AITER_FA", "--arch", "gfx1100"], "gfx9"),
        (["select", "--mla", "--backend", "TRITON_MLA", "--block-size", "1"], "block size 1"),
        (["select", "--arch", "mi300"], "mi300"),
        (["select", "--kv-block-size", "0"], "--kv-block-size is 0"),
        (["select", "--head-dim", "0"], "--head-dim is 0; allowed is 1 and more"),
        (["select", "--q-len", "-3"], "--q-len is -3"),
        (["select", "--window", "0"], "--window is 0"),
        (["backends", "--arch", "mi300"], "mi300"),
    ],
)
def test_errors_of_the_user_are_one_line_and_status_2(capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rocm-attn: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2


def test_rich_only_on_a_terminal(run, monkeypatch):
    pytest.importorskip("rich")
    plain = run("backends")
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    fancy = run("backends")
    assert fancy != plain
    assert "┃" in fancy
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("backends") == plain


def test_it_works_in_a_fresh_process(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "ROCM_ATTN_"))}
    code = "import sys; from rocm_attn_compile.cli import main; sys.exit(main(['backends', '--json']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 7


def test_aot_and_isa_report(run, tmp_path):
    """Kernels compiled for a GPU that is not here; the files it writes are measured alike by isa-report."""
    pytest.importorskip("triton")
    size = ("--num-heads", "8", "--num-kv-heads", "2", "--head-dim", "64", "--q-len", "256", "--causal")
    (compiled,) = json.loads(run("aot", "--arch", "gfx942", *size, "--json", "--out", str(tmp_path)))
    assert compiled["kernel"] == "attention_forward_kernel"
    assert compiled["matrix_instructions"] > 0
    assert compiled["main_loop"]["cycles"]["matrix"] > 0
    assert (tmp_path / "attention_forward_kernel.hsaco").read_bytes()[:4] == b"\x7fELF"
    (reported,) = json.loads(run("isa-report", str(tmp_path), "--json"))
    launch_data = {"lds_bytes", "occupancy", "limited_by", "threads"}
    assert {k: v for k, v in reported.items() if k not in launch_data} == {
        k: v for k, v in compiled.items() if k not in launch_data
    }
    (tmp_path / "attention_forward_kernel.json").write_text(
        json.dumps({"shared": compiled["lds_bytes"], "num_warps": compiled["threads"] // 64})
    )
    assert json.loads(run("isa-report", str(tmp_path), "--json")) == [compiled]
    header, _, row = run("isa-report", str(tmp_path / "attention_forward_kernel.amdgcn")).splitlines()
    assert header.split()[:3] == ["kernel", "arch", "VGPRs"]
    assert row.split()[:3] == ["attention_forward_kernel", "gfx942", str(compiled["vgprs"])]


def test_aot_of_latent_attention(run):
    """A decode step compiles the absorbed kernel, a prompt the prefill kernel."""
    pytest.importorskip("triton")
    common = ("aot", "--arch", "gfx942", "--mla", "--num-heads", "16", "--causal", "--json")
    step = json.loads(run(*common, "--q-len", "1", "--kv-len", "64"))
    assert [row["kernel"] for row in step] == ["mla_decode_kernel"]
    prompt = json.loads(run(*common, "--q-len", "512"))
    assert [row["kernel"] for row in prompt] == ["attention_forward_kernel"]
    for row in (*step, *prompt):
        assert row["matrix_instructions"] > 0
        assert row["vgpr_spills"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aot"], "name the GPU to compile for: --arch gfx942"),
        (
            ["aot", "--arch", "sm_90"],
            "--arch must be gfx90a, gfx942, gfx950 or one of gfx11.. and gfx12..; got 'sm_90'",
        ),
        (["isa-report", "nowhere"], "nowhere: no such file or folder"),
        (["isa-report", "."], "no .amdgcn file in this folder"),
        (["isa-report", "x.s"], "this is not AMD GPU assembly"),
    ],
)
def test_errors_of_the_kernel_commands(arguments, message, capsys, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.s").write_text("ret\n")
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
