"""Tuning without a GPU: the kernels run in Triton's interpreter, and a timer that we wrote says how long they took."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


from rocm_attn_compile.kernels.triton import aot, aot_launches, autotune, configs, tuned
from rocm_attn_compile.kernels.triton.candidates import SHARED_BYTES, Problem, candidates, fits, shared_bytes
from rocm_attn_compile.kernels.triton.configs import KernelConfig
from rocm_attn_compile.kernels.triton.launch import Tuning
from rocm_attn_compile.kernels.triton.tuned_store import TunedStore, cache_folder
from rocm_attn_compile.ops.schemas import OPTIONAL_TENSORS

SHIPPED = "16.16.1.1.0.0.0.0.p"
WIDE = "16.32.1.1.0.0.0.0.p"
DIRECTIONS = ["decode", "backward_kv", "backward_q"]


def call(kv_len: int = 37) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 16, generator=generator) for h, n in ((2, 5), (1, kv_len), (1, kv_len)))
    return {
        "q": q, "k": k, "v": v, **dict.fromkeys(OPTIONAL_TENSORS), "softmax_scale": 0.25, "logits_soft_cap": None,
        "band_lower": None, "band_upper": None, "dropout_p": 0.0, "empty_rows": "nan", "out_layout": "bhsd",
    }  # fmt: skip


def tune(worker: Any, store: dict | None = None, times: dict | None = None, **more: Any) -> Any:
    arguments = {"corrupt": "", "failing": "", "wants_grad": False, **call(), **more}
    return worker.call("autotune", store=store or {}, times=times or {}, **arguments)


def test_the_fastest_right_candidate_is_chosen_and_stored(worker: Any) -> None:
    times = {f"decode={WIDE}": 50.0, f"backward_q={WIDE}": 60.0}
    rows, store, timed, text = tune(worker, times=times, wants_grad=True)
    assert [row["direction"] for row in rows] == DIRECTIONS
    assert [row["config"] for row in rows] == [WIDE, SHIPPED, WIDE]
    assert (rows[0]["us"], rows[0]["shipped_us"], rows[0]["rejected"]) == (50.0, 100.0, [])
    assert "16 x 32" in rows[0]["text"] and "50.0 us, shipped 100.0 us" in rows[0]["text"]
    assert len(store) == 3 and json.loads(json.dumps(store)) == store
    assert timed[0] == f"decode={SHIPPED}" and rows[0]["tried"] == 4
    assert tuned.encode(tuned.decode(text)) == text and text.startswith(f"decode={WIDE};")

    again, _, timed, text_again = tune(worker, store=store, wants_grad=True)
    assert timed == [] and text_again == text and all(row["stored"] for row in again)


def test_what_is_chosen_computes_the_same(worker: Any) -> None:
    arguments = call()
    plain = worker.call("forward", tuning=None, **arguments)
    chosen = worker.call("forward", tuning={"chosen": tuned.decode(f"decode={WIDE}")}, **arguments)
    other = worker.call("forward", tuning={"chosen": tuned.decode(f"backward_q={WIDE}")}, **arguments)
    torch.testing.assert_close(chosen, plain)
    assert not torch.equal(chosen[0], plain[0]), "other tiles add up in another order"
    assert torch.equal(other[0], plain[0])


def test_noise_changes_nothing(worker: Any) -> None:
    rows, *_ = tune(worker, times={f"decode={WIDE}": 98.5})
    assert rows[0]["config"] == SHIPPED


def test_a_wrong_or_failing_candidate_is_rejected_and_named(worker: Any) -> None:
    for kind, word in (("corrupt", "differs"), ("failing", "shared memory")):
        rows, store, timed, _ = tune(worker, times={f"decode={WIDE}": 1.0}, **{kind: f"decode={WIDE}"})
        assert rows[0]["config"] == SHIPPED
        (reason,) = rows[0]["rejected"]
        assert WIDE in reason and word in reason and reason in rows[0]["text"]
        assert f"decode={WIDE}" not in timed
        assert next(iter(store.values()))["rejected"] == [reason]


def test_the_shape_class_is_what_is_stored(worker: Any) -> None:
    _, store, *_ = tune(worker)
    assert tune(worker, store=store, **call(50))[2] == [], "the same class of lengths"
    assert tune(worker, store=store, **call(70))[2] != []
    assert tune(worker, store=store, band_upper=0)[2] != []


def test_an_entry_that_means_nothing_is_measured_again(worker: Any) -> None:
    _, store, *_ = tune(worker)
    (key,) = store
    for entry in ({"config": "1.2.3"}, {}, None, "x", {**store[key], "us": "fast"}):
        _, after, timed, _ = tune(worker, store={key: entry})
        assert timed and after[key]["config"] == SHIPPED


def test_store_is_kept_shared_and_survives_rubbish(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "deep" / "a.json"
    first, second = TunedStore(path), TunedStore(path)
    first["a"] = 1
    second["b"] = 2
    assert dict(TunedStore(path)) == {"a": 1, "b": 2}, "each keeps what the other has written"
    del first["a"]
    assert dict(TunedStore(path)) == {"b": 2}
    for rubbish in ("{", "[]", '{"entries": [1]}', "", "\x00"):
        path.write_text(rubbish)
        caplog.clear()
        store = TunedStore(path)
        assert dict(store) == {} and "counts as empty" in caplog.text
        store["c"] = 3
        assert dict(TunedStore(path)) == {"c": 3}
    assert [p.name for p in path.parent.iterdir() if p.suffix not in (".json", ".lock")] == []


def test_store_that_cannot_be_written_is_said(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").touch()
    store = TunedStore(tmp_path / "file" / "a.json")
    store["a"] = 1
    assert store["a"] == 1 and "cannot be stored" in caplog.text


_WRITER = """
import sys
from pathlib import Path
from rocm_attn_compile.kernels.triton.tuned_store import TunedStore
store = TunedStore(Path(sys.argv[1]))
for index in range(6):
    store[f"{sys.argv[2]} {index}"] = index
"""


def test_processes_write_at_once_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    command = [sys.executable, "-c", _WRITER, str(path)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda name: subprocess.run([*command, name], cwd=tmp_path), "ab"))
    assert [one.returncode for one in done] == [0, 0]
    assert len(TunedStore(path)) == 12


def test_cache_folder_is_where_the_user_says(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rocm_attn"
    monkeypatch.setenv("ROCM_ATTN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_a_choice_that_needs_descriptors_counts_where_they_can_be_had() -> None:
    config = KernelConfig(128, 128, 8, 2)

    def planned(length: int, **more: Any) -> tuple[KernelConfig | None, bool]:
        how = Tuning(arch="sm90", chosen=(("forward", config, True),), **more)
        sizes = {"q_len": length, "kv_len": length, "backward": False}
        launches = aot_launches.launches("sm90", torch.bfloat16, 128, **sizes, tuning=how)
        launch = launches["attention_forward_kernel"]
        return launch.config, launch.arguments["TMA"]

    plain = configs.select("sm90", "forward", 128, 2)
    assert planned(1024) == (config, True)
    assert planned(128) == (plain, False), "so few scores that descriptors do not pay"
    assert planned(1024, opaque=True) == (plain, False), "an opaque call has to be longer"
    assert planned(8192, opaque=True) == (config, True)


def every_kernel() -> Iterator[tuple[Problem, KernelConfig, bool]]:
    sizes = (64, 128, 256)
    for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "sm90", "sm80"):
        for direction in ("forward", "decode", "backward_kv", "backward_q"):
            for size in sizes:
                for itemsize in (2, 4):
                    blocks = (size, 0, size)
                    yield (
                        Problem(arch, direction, blocks, itemsize),
                        configs.select(arch, direction, size, itemsize),
                        False,
                    )
        tma = configs.select_tma(arch, "forward_tma", 128, 2)
        if tma:
            yield Problem(arch, "forward", (128, 0, 128), 2), tma, True


def test_candidates_are_few_begin_with_the_shipped_one_and_fit() -> None:
    for problem, shipped, tma in every_kernel():
        plain = configs.select(problem.arch, problem.direction, max(problem.blocks), problem.itemsize) if tma else None
        found = candidates(problem, shipped, tma, plain)
        assert found[0] == (shipped, tma) and len(set(found)) == len(found) <= 14, problem
        assert all(fits(config, problem) for config, _ in found[1:] if config != plain), problem
        assert all(
            config.block_m >= 64 for config, _ in found if problem.arch == "sm90" and problem.direction == "forward"
            and problem.itemsize == 2
        )  # fmt: skip


def test_what_is_too_large_is_left_out() -> None:
    problem = Problem("gfx942", "forward", (128, 0, 128), 2)
    assert fits(KernelConfig(128, 32, 4, 2), problem)
    assert not fits(KernelConfig(128, 64, 4, 4), problem)
    assert shared_bytes(KernelConfig(128, 64, 4, 4), problem) > 65536
    assert not fits(KernelConfig(256, 256, 2, 1), problem), "registers"


def compiled_within_the_count(arch: str, kernel: str, tried: slice) -> None:
    """Compile candidates of a kernel and compare their shared memory with the count that let them pass."""
    sizes = {"head_dim": 128, "q_len": 2048, "kv_len": 2048}
    shipped = aot_launches.launches(arch, torch.bfloat16, **sizes)[kernel]
    for config, tma in autotune._candidates(shipped, arch)[tried]:
        chosen = Tuning(arch=arch, chosen=((shipped.direction, config, tma),))
        launch = aot_launches.launches(arch, torch.bfloat16, **sizes, tuning=chosen)[kernel]
        assert launch.config == config
        used = aot.compile_launch(launch, arch).metadata.shared
        given = launch.arguments
        problem = Problem(arch, launch.direction, (given["BLOCK_D"], given["BLOCK_REST"], given["BLOCK_E"]), 2)
        assert used <= shared_bytes(config, problem), config
        assert used <= SHARED_BYTES[configs.family(arch)], config


def test_the_count_is_an_upper_bound() -> None:
    compiled_within_the_count("gfx942", "attention_forward_kernel", slice(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "sm90"])
@pytest.mark.parametrize("kernel", ["attention_forward_kernel", "backward_dkdv_kernel", "backward_dq_kernel"])
def test_the_count_is_an_upper_bound_everywhere(arch: str, kernel: str) -> None:
    compiled_within_the_count(arch, kernel, slice(None))


@pytest.mark.parametrize("text", ["", "1.2", "forward=1.2.3.4.5.6.7.8.x", "a.b.c.d.e.f.g.h.t"])
def test_a_text_that_is_no_choice_is_an_error(text: str) -> None:
    if text:
        with pytest.raises(ValueError, match="launch configuration"):
            tuned.decode(text)
    else:
        assert tuned.decode(text) == ()
