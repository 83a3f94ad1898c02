"""The names that RDNA 3 and 4 gave to instructions mean what the old ones mean, which the other tests execute.

From LLVM's and AMD's tables of renamed instructions (RDNA3 ISA, "Differences from RDNA2"; RDNA4 ISA likewise).
"""

from __future__ import annotations

import pytest
from gcnsim.build import library, mnemonics
from gcnsim.encode import NO_EFFECT

WIDTHS = {
    "dword": "b32", "dwordx2": "b64", "dwordx3": "b96", "dwordx4": "b128",
}  # fmt: skip
NARROW = {
    "load_ubyte": "load_u8", "load_sbyte": "load_i8", "load_ushort": "load_u16", "load_sshort": "load_i16",
    "load_short_d16": "load_d16_b16", "load_short_d16_hi": "load_d16_hi_b16", "store_byte": "store_b8",
    "store_short": "store_b16", "store_short_d16_hi": "store_d16_hi_b16", "store_byte_d16_hi": "store_d16_hi_b8",
}  # fmt: skip
RENAMED = {
    **{f"{kind}_{way}_{old}": f"{kind}_{way}_{new}" for kind in ("global", "flat", "scratch", "buffer")
       for way in ("load", "store") for old, new in WIDTHS.items()},
    **{f"{kind}_{old}": f"{kind}_{new}" for kind in ("global", "flat", "scratch", "buffer")
       for old, new in NARROW.items()},
    **{f"ds_read_{w}": f"ds_load_{w}" for w in ("b32", "b64", "b96", "b128", "u8", "i8", "u16", "i16")},
    **{f"ds_write_{w}": f"ds_store_{w}" for w in ("b8", "b16", "b32", "b64", "b96", "b128")},
    **{f"ds_read2_{w}": f"ds_load_2addr_{w}" for w in ("b32", "b64")},
    **{f"ds_write2_{w}": f"ds_store_2addr_{w}" for w in ("b32", "b64")},
    **{f"ds_read2st64_{w}": f"ds_load_2addr_stride64_{w}" for w in ("b32", "b64")},
    **{f"ds_write2st64_{w}": f"ds_store_2addr_stride64_{w}" for w in ("b32", "b64")},
    "ds_read_u16_d16_hi": "ds_load_u16_d16_hi", "ds_write_b16_d16_hi": "ds_store_b16_d16_hi",
    "s_load_dword": "s_load_b32", "s_load_dwordx2": "s_load_b64", "s_load_dwordx4": "s_load_b128",
    "s_load_dwordx8": "s_load_b256", "s_load_dwordx16": "s_load_b512", "s_buffer_load_dword": "s_buffer_load_b32",
    "v_add_u32": "v_add_nc_u32", "v_sub_u32": "v_sub_nc_u32", "v_subrev_u32": "v_subrev_nc_u32",
    "v_add_u16": "v_add_nc_u16", "v_addc_co_u32": "v_add_co_ci_u32", "v_subb_co_u32": "v_sub_co_ci_u32",
    "v_max_f32": "v_max_num_f32", "v_min_f32": "v_min_num_f32", "v_max3_f32": "v_max3_num_f32",
    "v_min3_f32": "v_min3_num_f32", "v_med3_f32": "v_med3_num_f32", "v_pk_max_f16": "v_pk_max_num_f16",
    "v_ffbh_u32": "v_clz_i32_u32", "v_ffbl_b32": "v_ctz_i32_b32", "v_cvt_pkrtz_f16_f32": "v_cvt_pk_rtz_f16_f32",
    "v_mad_u64_u32": "v_mad_co_u64_u32", "v_mad_i64_i32": "v_mad_co_i64_i32",
    "s_add_u32": "s_add_co_u32", "s_addc_u32": "s_add_co_ci_u32", "s_sub_u32": "s_sub_co_u32",
    "s_subb_u32": "s_sub_co_ci_u32", "s_add_i32": "s_add_co_i32", "s_sub_i32": "s_sub_co_i32",
    "s_addk_i32": "s_addk_co_i32", "s_ff1_i32_b32": "s_ctz_i32_b32", "s_flbit_i32_b32": "s_clz_i32_u32",
    "global_atomic_add": "global_atomic_add_u32", "global_atomic_smax": "global_atomic_max_i32",
    "global_atomic_umax": "global_atomic_max_u32", "global_atomic_swap": "global_atomic_swap_b32",
    "global_atomic_cmpswap": "global_atomic_cmpswap_b32",
    "s_barrier": "s_barrier_wait",  # s_barrier_signal has no effect of its own here
}  # fmt: skip


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_instructions(old: str) -> None:
    handler = library().gcnsim_handler
    assert handler(old.encode())
    assert handler(RENAMED[old].encode()) == handler(old.encode())


def test_nothing_implemented_is_skipped() -> None:
    """A mnemonic with an implementation is not also on the list of those without effect."""
    assert [name for name in mnemonics() if NO_EFFECT.match(name) and name != "s_nop"] == []
