"""Which queries of latent attention Hopper's kernels read through tensor descriptors, and which launch waits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rocm_attn_compile.kernels.triton import aot, mla_configs
from rocm_attn_compile.kernels.triton.aot_mla import launches
from rocm_attn_compile.kernels.triton.mla_descriptors import query_boxes, takes_query_boxes

HALF = torch.bfloat16


def queries(heads: int, q_len: int, width: int = 512) -> torch.Tensor:
    return torch.zeros(2, heads, q_len, width, dtype=HALF)


@pytest.mark.parametrize(
    ("heads", "q_len", "rows"), [(128, 1, 64), (100, 1, 64), (1, 1, 16), (128, 3, 64), (16, 5, 16)]
)
def test_tiles_of_one_position_are_copied(heads: int, q_len: int, rows: int) -> None:
    assert takes_query_boxes(queries(heads, q_len), rows)


@pytest.mark.parametrize(("heads", "q_len", "rows"), [(20, 3, 64), (100, 2, 64), (8, 2, 16)])
def test_tiles_of_several_positions_are_loaded(heads: int, q_len: int, rows: int) -> None:
    assert not takes_query_boxes(queries(heads, q_len), rows)


def test_queries_that_descriptors_cannot_address_are_loaded() -> None:
    offset = torch.zeros(2 * 16 * 512 + 1, dtype=HALF)[1:].view(2, 16, 1, 512)
    odd_rows = torch.zeros(2, 16, 1, 515, dtype=HALF)[..., :512]
    expanded = torch.zeros(1, 16, 1, 512, dtype=HALF).expand(2, -1, -1, -1)
    odd_width = torch.zeros(2, 16, 1, 520, dtype=HALF)[..., :510]
    for tensor in (offset, odd_rows, expanded, odd_width):
        assert not takes_query_boxes(tensor, 16)
        # Both kinds of queries or neither.
        for pair in ((tensor, queries(16, 1, 64)), (queries(16, 1), tensor)):
            assert query_boxes(*pair, 16, 256, 64) == {"QUERY_TMA": False, "q_boxes": None, "q_pe_boxes": None}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_box_holds_heads_of_one_position(layout: str) -> None:
    q = queries(128, 3) if layout == "bhsd" else torch.zeros(2, 3, 128, 512, dtype=HALF).transpose(1, 2)
    box = query_boxes(q, None, 64, 256, 0)["q_boxes"]
    assert box.shape == (2, 3, 128, 512)
    assert box.strides == (q.stride(0), q.stride(2), q.stride(1), 1)
    assert box.block_shape == (1, 1, 64, 256)


@pytest.mark.parametrize(("heads", "kernel", "combine"), [
    (16, "mla_decode_few_kernel", "attention_combine_kernel"), (128, "mla_decode_hopper_kernel", "mla_combine_kernel"),
])  # fmt: skip
def test_the_sum_of_the_shares_waits_for_hoppers_kernels(heads: int, kernel: str, combine: str) -> None:
    """It is launched early exactly where it waits by itself; and on AMD neither."""
    found = launches("sm90", HALF, heads, num_splits=4)
    assert "griddepcontrol.launch_dependents" in aot.compile_launch(found[kernel], "sm90").asm["ptx"]
    assert "griddepcontrol.wait" in aot.compile_launch(found[combine], "sm90").asm["ptx"]
    assert found[combine].options["launch_pdl"]
    for arch in ("gfx942", "sm90"):
        plain = launches(arch, HALF, heads, kv_lora_rank=256, num_splits=4)["attention_combine_kernel"]
        assert not plain.arguments["WAITS"]
        assert "launch_pdl" not in plain.options


@pytest.mark.parametrize(("heads", "q_len"), [(128, 3), (20, 3)])
def test_shares_are_written_as_queries_are_read(heads: int, q_len: int) -> None:
    launch = launches("sm90", HALF, heads, q_len=q_len, num_splits=4)["mla_decode_hopper_kernel"]
    boxes, partial = launch.arguments["share_boxes"], launch.arguments["partial"]
    assert launch.arguments["QUERY_TMA"] == (heads == 128)
    if heads == 20:
        assert boxes is None
        return
    # Row ((batch * H + head) * M + q_pos) * splits + split, as the sum of the shares reads it.
    assert boxes.shape == (2, 3, 128, 4, 512)
    assert boxes.strides == (128 * 3 * 4 * 512, 4 * 512, 3 * 4 * 512, 512, 1)
    assert partial.shape == (2 * 128 * 3 * 4, 512)


@pytest.mark.parametrize(("heads", "latent", "dtype", "scaled"), [
    (128, 512, HALF, True), (20, 512, HALF, True), (128, 512, torch.float16, False), (5, 512, HALF, False),
])  # fmt: skip
def test_tall_tiles_of_bfloat16_store_their_shares_scaled(
    heads: int, latent: int, dtype: torch.dtype, scaled: bool
) -> None:
    """Kernel, sum and the number of statistics agree; float16 results are worth as much as such shares, or more."""
    found = launches("sm90", dtype, heads, kv_lora_rank=latent, q_len=3, num_splits=4)
    (main,) = (launch for name, launch in found.items() if name.startswith("mla_decode"))
    name = "mla_combine_kernel" if heads > 5 else "attention_combine_kernel"
    combine = found[name].arguments
    assert combine.get("SCALED", False) == scaled
    for arguments in (main.arguments, combine):
        assert arguments["partial"].dtype == (torch.float16 if scaled else torch.float32)
        assert arguments["partial_stats"].shape[1] == (3 if scaled else 2)
    # Rows of no whole 16 bytes, as descriptors need them.
    assert not mla_configs.scales_shares(64, HALF, 300)
