"""Inputs for a model of which only the signature and the configuration are known."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

BATCH, LENGTH, TARGET_LENGTH = 2, 12, 7


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the fields that the configuration, or one nested in it, has."""
    nested = [v for v in vars(config).values() if hasattr(v, "to_dict")]
    for name in names:
        for place in (config, *nested):
            value = getattr(place, name, None)
            if value is not None and not isinstance(value, bool):
                return value
    return default


def candidates(model: Any, config: Any, padded: bool) -> Iterator[dict[str, Any]]:
    """Sets of arguments, the most likely first; the caller takes the first that runs."""
    names = list(inspect.signature(model.forward).parameters)
    text = _text(names, padded)
    if "use_cache" in names:
        text["use_cache"] = False
    images = [*_grids(names, config), *_images(names, config)]
    audio = list(_audio(names, config))
    other = [i for i in [*images, *audio] if i]
    if other and model.main_input_name not in ("input_ids",):
        for extra in other:
            yield extra
            yield {**text, **extra}
    if "input_ids" in text:
        yield text
        yield {k: v for k, v in text.items() if k != "decoder_input_ids"}
    for extra in other:
        yield {**text, **extra}
        yield extra


def _text(names: list[str], padded: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ids = torch.randint(3, 80, (BATCH, LENGTH))
    if "input_ids" in names:
        found["input_ids"] = ids
        if "attention_mask" in names:
            keep = torch.ones(BATCH, LENGTH, dtype=torch.long)
            if padded:
                keep[0, :4] = 0
                found["attention_mask"] = keep
    if "bbox" in names:
        found["bbox"] = torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4).contiguous()
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = torch.randint(3, 80, (BATCH, TARGET_LENGTH))
    return found


def _images(names: list[str], config: Any) -> Iterator[dict[str, Any]]:
    key = next((n for n in ("pixel_values", "pixel_values_videos", "images", "x") if n in names), None)
    if key is None:
        return
    size = find(config, "image_size", "img_size", "input_size", default=64)
    if isinstance(size, dict):
        size = (size.get("height", 64), size.get("width", 64))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = find(config, "num_frames", "frames_per_clip", default=2)
    frames = frames if isinstance(frames, int) else 2
    image = torch.randn(BATCH, channels, height, width)
    yield {key: image}
    yield {key: image, "pixel_mask": torch.ones(BATCH, height, width, dtype=torch.long)}
    yield {key: torch.randn(BATCH, frames, channels, height, width)}
    yield {key: torch.randn(BATCH, channels, frames, height, width)}
    yield {key: torch.randn(BATCH, channels, 128, 128)}


def _grids(names: list[str], config: Any) -> Iterator[dict[str, Any]]:
    """Vision parts that take the patches of all images in one row: one image of 4 x 8 patches, one of 4 x 4."""
    key = next((n for n in ("pixel_values", "hidden_states") if n in names), None)
    grid = next((n for n in ("grid_thw", "image_grid_thw") if n in names), None)
    if key is None or grid is None or "input_ids" in names:
        return
    size, channels = find(config, "patch_size", default=8), find(config, "num_channels", "in_channels", default=3)
    frames = find(config, "temporal_patch_size", default=1)
    patches = {grid: torch.tensor([[1, 4, 8], [1, 4, 4]])}
    if "merge_sizes" in names:
        patches["merge_sizes"] = torch.tensor([2, 2])
    yield {key: torch.randn(48, channels * frames * size * size), **patches}
    yield {key: torch.randn(48, channels, size, size), **patches}


def _audio(names: list[str], config: Any) -> Iterator[dict[str, Any]]:
    mels = find(config, "num_mel_bins", "n_mels", "num_mels", "input_feat_per_channel", "feature_size", default=16)
    mels = mels if isinstance(mels, int) else 16
    positions = find(config, "max_source_positions", default=20)
    if "input_features" in names:
        yield {"input_features": torch.randn(BATCH, mels, 2 * positions)}
        yield {"input_features": torch.randn(BATCH, 64, mels)}
        mask = torch.ones(BATCH, 64, dtype=torch.long)
        yield {"input_features": torch.randn(BATCH, 64, mels), "attention_mask": mask}
    if "input_values" in names:
        yield {"input_values": torch.randn(BATCH, 4000)}
        yield {"input_values": torch.randn(BATCH, 1, 4000)}
        yield {"input_values": torch.randn(BATCH, find(config, "max_length", default=64), mels)}
    if "past_values" in names:
        length = find(config, "context_length", default=32)
        channels = find(config, "num_input_channels", "input_size", default=1)
        yield {"past_values": torch.randn(BATCH, length, channels)}
        yield {"past_values": torch.randn(BATCH, length)}
