"""`rocm-attn`: what the backends can do, what this machine is, which backend an attention gets, its kernels."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from . import cli_kernels
from .backends import BACKENDS, tables
from .backends.select import Choice, select
from .backends.words import DTYPE_NAMES, dtype_name, mask_words, spec_data, words
from .env import Environment, normalize_arch
from .ops.kv_cache import FP8
from .options import Options, split_options
from .spec import AttentionSpec, CacheSpec, EmptyRows, LatentSpec, MaskSpec


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for an error of the user's.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
    """
    arguments = _parser().parse_args(argv)
    try:
        print(arguments.command(arguments))
    except (ValueError, RuntimeError) as error:
        print(f"rocm-attn: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rocm-attn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    backends = commands.add_parser("backends", help="what each backend takes, from its declaration")
    backends.add_argument("--arch", help='only those with kernels for it, such as "gfx942"')
    form = backends.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as docs/backends.md")
    backends.set_defaults(command=_backends)

    env = commands.add_parser("env", help="versions, GPU and flags; paste it into bug reports")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(command=_env)

    choose = commands.add_parser("select", help="which backend an attention would get, and why")
    _add_spec_arguments(choose)
    choose.add_argument("--json", action="store_true", help="as JSON")
    choose.set_defaults(command=_select)
    cli_kernels.add_commands(commands, _add_spec_arguments, lambda arguments: _site(arguments)[:2], _table)
    return parser


def _add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", help='target architecture, such as "gfx942"; default is this machine\'s GPU')
    add("--backend", help="as VLLM_ATTENTION_BACKEND")
    add("--block-size", type=int, help="page size of the KV cache, for the MLA rules")
    add("--kv-block-size", type=int, help="keys and values are read from a paged cache of such blocks")
    add("--kv-dtype", choices=list(_FLOAT8), help="they are read from a float8 cache, with scales")
    add("--dtype", choices=list(DTYPE_NAMES.values()), default="bf16", help="default: bf16")
    add("--batch", type=int, default=1, help="default: 1")
    add("--num-heads", type=int, default=32, help="query heads; default: 32")
    add("--num-kv-heads", type=int, help="default: --num-heads")
    add("--head-dim", type=int, default=128, help="of queries and keys; default: 128")
    add("--v-head-dim", type=int, help="default: --head-dim")
    add("--q-len", type=int, default=1024, help="default: 1024")
    add("--kv-len", type=int, help="default: --q-len")
    add("--scale", type=float, help="default: 1/sqrt(head_dim)")
    add("--causal", action="store_true", help="aligned bottom-right")
    add("--window", type=int, help="keys seen, self included; implies --causal")
    add("--soft-cap", type=float, help="c of c * tanh(score / c); default: none")
    add("--score-floor", type=float, help="scores are raised to it; default: none")
    add("--bias", action="store_true", help="a float bias tensor")
    add("--alibi", action="store_true", help="ALiBi: a slope per head")
    add("--sinks", action="store_true", help="learned sinks")
    add("--dropout", type=float, default=0.0, help="probability; default: 0")
    add("--training", action="store_true", help="gradients are wanted")
    add("--weights", action="store_true", help="the weights are a result, too")
    add("--mla", action="store_true", help="latent attention, of DeepSeek's sizes")
    add("--device", choices=["cuda", "cpu"], help="default: cuda (which is ROCm too) if there is an architecture")


_SIZES = (
    "batch", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "q_len", "kv_len", "window", "block_size",
    "kv_block_size",
)  # fmt: skip
_FLOAT8 = {dtype_name(dtype): dtype for dtype in FP8}
_DEEPSEEK = LatentSpec(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def _backends(arguments: argparse.Namespace) -> str:
    if arguments.markdown:
        return tables.markdown().rstrip("\n")
    chosen = list(BACKENDS)
    if arguments.arch is not None:
        arch = normalize_arch(arguments.arch, "--arch")
        chosen = [backend for backend in chosen if backend.runs_on(arch)]
    if arguments.json:
        return json.dumps([tables.backend_data(backend) for backend in chosen], indent=2)
    names = {backend.name for backend in chosen}
    matrix = [tables.features_header(), *tables.features_rows()]
    keep = [column for column, name in enumerate(matrix[0]) if column == 0 or name in names]
    header, *rows = [tuple(line[column] for column in keep) for line in matrix]
    limits = [f"{b.name}: {limit.summary} ({limit.code})" for b in chosen for limit in b.limits]
    overview = _table(tables.HEADER, [tables.backend_row(backend) for backend in chosen])
    return "\n\n".join([overview, _table(header, rows), "\n".join(["limits:", *limits])])


def _env(arguments: argparse.Namespace) -> str:
    env = Environment.current()
    data: dict[str, Any] = env.to_dict()
    data["platform"] = platform.platform()
    # Every variable of ours or of the rules, also one that is misspelt and therefore does nothing.
    data["variables"] = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("VLLM_", "ROCM_ATTN_"))}
    if arguments.json:
        return json.dumps(data, indent=2)
    lines = [f"{name}: {version or 'absent'}" for name, version in data["versions"].items()]
    gpu = f"{env.device_name} ({env.device_arch})" if env.device_arch else "none"
    lines += [f"aiter: {data['aiter']}", f"gpu: {gpu}", f"target: {env.arch or 'none'} (from {env.arch_source})"]
    lines += [f"platform: {data['platform']}", "variables:" + ("" if data["variables"] else " none set")]
    lines += [f"  {name}={value}" for name, value in data["variables"].items()]
    return "\n".join(lines)


def _site(arguments: argparse.Namespace) -> tuple[AttentionSpec, str | None, Environment, Options]:
    """The attention that the options describe, the target's architecture, and what selection needs."""
    for name in _SIZES:
        size = getattr(arguments, name)
        if size is not None and size < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {size}; allowed is 1 and more")
    given = {"arch": arguments.arch, "attention_backend": arguments.backend, "block_size": arguments.block_size}
    options: Options = split_options({name: value for name, value in given.items() if value is not None})[0]
    env = Environment.current(options)
    return _spec(arguments, env), env.arch, env, options


def _select(arguments: argparse.Namespace) -> str:
    spec, _, env, options = _site(arguments)
    outcome = select(spec, env, options)
    if arguments.json:
        data = {
            "spec": spec_data(spec),
            "backend": outcome.backend if isinstance(outcome, Choice) else None,
            "preferred": outcome.preferred,
            "sentences": list(outcome.sentences),
            "rejected": {name: [asdict(reason) for reason in reasons] for name, reasons in outcome.rejected.items()},
        }
        return json.dumps(data, indent=2)
    lines = [words(spec), f"mask: {mask_words(spec.mask)}", f"target: {env.arch_for(spec.device) or 'none'}"]
    lines += [f"backend: {outcome.backend}" if isinstance(outcome, Choice) else "backend: none, left as it is"]
    lines += [f"because {sentence}" for sentence in outcome.sentences]
    for name, reasons in outcome.rejected.items():
        lines += [f"not {name}:", *(f"  {reason}" for reason in reasons)]
    return "\n".join(lines)


def _spec(arguments: argparse.Namespace, env: Environment) -> AttentionSpec:
    q_len = arguments.q_len
    kv_len = q_len if arguments.kv_len is None else arguments.kv_len
    end = kv_len - q_len
    text = " and ".join(
        [
            *(["causal"] if arguments.causal or arguments.window else []),
            *([f"window {arguments.window}"] if arguments.window else []),
        ]
    )
    mask = MaskSpec(
        band_upper=end if text else None,
        band_lower=end + 1 - arguments.window if arguments.window else None,
        empty_rows=EmptyRows.NAN if text and q_len > kv_len else EmptyRows.IMPOSSIBLE,
        text=text or "none",
    )
    device = arguments.device or ("cuda" if env.arch else "cpu")
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    return AttentionSpec(
        batch=arguments.batch,
        num_heads=arguments.num_heads,
        num_kv_heads=arguments.num_kv_heads or arguments.num_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=arguments.head_dim,
        v_head_dim=arguments.v_head_dim or arguments.head_dim,
        dtype=dtypes[arguments.dtype],
        device=device,
        softmax_scale=arguments.head_dim**-0.5 if arguments.scale is None else arguments.scale,
        logits_soft_cap=arguments.soft_cap,
        score_floor=arguments.score_floor,
        mask=mask,
        has_bias=arguments.bias,
        has_alibi=arguments.alibi,
        bias_requires_grad=arguments.bias and arguments.training,
        has_sinks=arguments.sinks,
        dropout_p=arguments.dropout,
        requires_grad=arguments.training,
        returned_weights=mask.empty_rows if arguments.weights else None,
        kind="mla" if arguments.mla else "attention",
        latent=_DEEPSEEK if arguments.mla else None,
        cache=_cache(arguments, dtypes[arguments.dtype]),
    )


def _cache(arguments: argparse.Namespace, dtype: torch.dtype) -> CacheSpec | None:
    """What `--kv-block-size` and `--kv-dtype` say of the cache that is read as it lies."""
    size, float8 = arguments.kv_block_size, _FLOAT8.get(arguments.kv_dtype)
    if size is None and float8 is None:
        return None
    return CacheSpec(size, float8 or dtype, has_scale=float8 is not None)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A rich table on a terminal if rich is there; plain text otherwise, and always when piped."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(*header)
            for row in rows:
                table.add_row(*row)
            console = Console()
            with console.capture() as captured:
                console.print(table)
            return captured.get().rstrip("\n")
    return tables.text_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
