"""What holds for every test: one thread, fixed seeds, a fresh Dynamo, empty reports, no environment of the caller's."""

from __future__ import annotations

import getpass
import os
import sys
import tempfile

# Read when torch and Inductor are imported, so set first. Logs of memory profiling are noise; compile workers cost
# more than they bring on small graphs.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
OWN_CACHE = "TORCHINDUCTOR_CACHE_DIR" not in os.environ  # torch sets it

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402

OURS_IN_ENVIRONMENT = ("VLLM_", "ROCM_ATTN_")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # A graph in Inductor's cache on disk that calls the op directly is kept under the op's name, not under its code.
    from rocm_attn_compile.backends.fingerprint import sources_digest

    if OWN_CACHE:
        folder = f"rocm-attn-tests-{getpass.getuser()}-{sources_digest()[:16]}"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), folder)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, and torch sees none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_report_header(config: pytest.Config) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: tests marked gpu are skipped"
    return f"torch {torch.__version__}, {device}"


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch):
    """Each test starts with seed 0, nothing compiled, no reports, and no flag of the caller's environment."""
    for name in list(os.environ):
        if name.startswith(OURS_IN_ENVIRONMENT):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    torch._dynamo.reset()
    package = sys.modules.get("rocm_attn_compile")
    if package is not None and hasattr(package, "reset_reports"):
        package.reset_reports()
