"""The snapshot: flag texts, architectures, and which package `aiter` is."""

import importlib
import itertools
import sys
import types
import warnings

import pytest
import torch

from rocm_attn_compile import env as env_module
from rocm_attn_compile.env import FLAG_VARIABLES, AiterPackage, Environment, Flags, RocmAttnWarning, normalize_arch
from rocm_attn_compile.options import Options

NO_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="states what holds without a GPU")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("true", True), ("TRUE", True), ("True", True), ("0", False), ("false", False)]
    + [(text, False) for text in ("yes", "on", "2", " 1", "1 ", "", "t", "True!")],
)
@pytest.mark.parametrize(("field", "variable"), FLAG_VARIABLES.items())
def test_flag_texts(field, variable, text, value):
    assert getattr(Flags.from_environ({variable: text}), field) is value


def test_flag_defaults():
    flags = Flags.from_environ({})
    assert flags == Flags(None, False, True, False, True, False)
    assert (flags.use_aiter_mha, flags.use_aiter_mla) == (True, True)


def test_backend_variable_is_taken_as_it_is():
    assert Flags.from_environ({"VLLM_ATTENTION_BACKEND": ""}).attention_backend == ""
    assert Flags.from_environ({"VLLM_ATTENTION_BACKEND": " x"}).attention_backend == " x"


def test_meaningless_flag_text_warns_and_is_false():
    with pytest.warns(RocmAttnWarning, match="VLLM_ROCM_USE_AITER='yes' means false"):
        env = Environment.current(environ={"VLLM_ROCM_USE_AITER": "yes"})
    assert env.flags.use_aiter is False


@pytest.mark.parametrize(
    ("name", "arch"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", "gfx90a"), ("gfx1100", "gfx1100"), ("sm_90", "sm_90")],
)
def test_normalize_arch(name, arch):
    assert normalize_arch(name) == arch


@pytest.mark.parametrize("name", ["", "gfx", "gfx9", "942", "GFX942", "mi300", "sm90", "gfx942 "])
def test_normalize_arch_refuses(name):
    with pytest.raises(ValueError, match='"gfx942"'):
        normalize_arch(name)


@NO_DEVICE
def test_arch_sources():
    assert (Environment.current(environ={}).arch, Environment.current(environ={}).arch_source) == (None, "none")
    by_option = Environment.current(Options(arch="gfx950"), environ={})
    assert (by_option.arch, by_option.arch_source, by_option.arch_is_explicit) == ("gfx950", "option", True)
    by_variable = Environment.current(environ={"ROCM_ATTN_ARCH": "gfx90a:sramecc+"})
    assert (by_variable.arch, by_variable.arch_source) == ("gfx90a", "variable")
    with pytest.raises(ValueError, match="ROCM_ATTN_ARCH"):
        Environment.current(environ={"ROCM_ATTN_ARCH": "mi300"})


def test_arch_variable_wins_with_a_warning():
    with pytest.warns(RocmAttnWarning, match="ROCM_ATTN_ARCH=gfx90a overrides"):
        env = Environment.current(Options(arch="gfx942"), environ={"ROCM_ATTN_ARCH": "gfx90a"})
    assert env.arch == "gfx90a"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Environment.current(Options(arch="gfx942"), environ={"ROCM_ATTN_ARCH": "gfx942"})


@pytest.mark.parametrize(("hip", "arch"), [("6.4", "gfx942"), (None, "sm_90")])
def test_device_architecture(monkeypatch, hip, arch):
    properties = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", name="A GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    env = Environment.current(environ={})
    assert (env.arch, env.arch_source, env.device_arch, env.device_name) == (arch, "device", arch, "A GPU")
    assert env.arch_for("cuda") == arch
    assert env.arch_for("cpu") is None  # the GPU beside CPU tensors does not count
    target = Environment.current(Options(arch="gfx950"), environ={})
    assert (target.arch_for("cpu"), target.arch_for("cuda"), target.device_arch) == ("gfx950", "gfx950", arch)


def test_device_that_may_not_be_touched(monkeypatch):
    def refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    assert Environment.current(environ={}).arch is None


def test_current_reads_os_environ_each_time(monkeypatch):
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "1")
    assert Environment.current().flags.use_aiter
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "0")
    assert not Environment.current().flags.use_aiter


AMD_FILES = ("__init__.py", "jit/core.py", "ops/mha.py")


def make_package(folder, files):
    for name in files:
        path = folder / "aiter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('ROCm version file not found')\n")


@pytest.fixture
def path_entry(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def test_amd_aiter_is_found_without_importing_it(path_entry):
    make_package(path_entry, AMD_FILES)
    found = AiterPackage.find()
    assert found.is_amd
    assert found.location == str(path_entry / "aiter")
    assert "aiter" not in sys.modules


@pytest.mark.parametrize("missing", [name for name in AMD_FILES if name != "__init__.py"])
def test_the_other_aiter_is_told_apart(path_entry, missing):
    make_package(path_entry, [name for name in AMD_FILES if name != missing])
    found = AiterPackage.find()
    assert not found.is_amd
    assert "unrelated" in str(found)


def test_a_single_module_named_aiter_is_not_amds(path_entry):
    (path_entry / "aiter.py").write_text("raise RuntimeError\n")
    found = AiterPackage.find()
    assert (found.is_amd, found.location) == (False, str(path_entry / "aiter.py"))


def test_no_aiter(monkeypatch):
    monkeypatch.setattr(env_module.importlib.util, "find_spec", lambda name: None)
    assert AiterPackage.find() == AiterPackage()
    assert str(AiterPackage()) == "absent"


def test_a_stub_in_sys_modules(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiter", types.ModuleType("aiter"))  # its __spec__ is None
    assert not AiterPackage.find().is_amd


def test_warn_says_each_thing_once_per_snapshot():
    env = Environment()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for text in ("a", "b", "a"):
            env.warn(text)
    assert sorted(str(warning.message) for warning in record) == ["a", "b"]
    with pytest.warns(RocmAttnWarning):
        Environment().warn("a")


def test_to_dict_is_plain_and_has_only_the_variables_that_are_set():
    import json

    environ = {"VLLM_ROCM_USE_AITER": "1", "ROCM_ATTN_ARCH": "gfx942", "HOME": "/x", "VLLM_OTHER": "1"}
    data = Environment.current(environ=environ).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["variables"] == {"VLLM_ROCM_USE_AITER": "1", "ROCM_ATTN_ARCH": "gfx942"}
    assert data["versions"]["torch"] == str(torch.__version__)


def test_every_documented_variable_exists():
    from pathlib import Path

    from rocm_attn_compile.env import SELECTION_VARIABLES
    from rocm_attn_compile.options import OPTION_VARIABLES

    text = (Path(__file__).parents[2] / "docs" / "env.md").read_text()
    for variable in itertools.chain(SELECTION_VARIABLES, OPTION_VARIABLES.values()):
        assert f"`{variable}`" in text, variable
    ours = {v for v in itertools.chain(SELECTION_VARIABLES, OPTION_VARIABLES.values()) if v.startswith("ROCM_ATTN_")}
    assert len(ours) <= 6
