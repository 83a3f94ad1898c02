"""Every architecture of transformers' auto mappings as tiny random models."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from .inputs import candidates
from .judge import Case
from .overrides import OVERRIDES
from .randomize import randomize
from .shrink import tiny

MAX_PARAMETERS = 60_000_000
_PREFERRED = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_CTC",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION",
    "MODEL_FOR_SEMANTIC_SEGMENTATION",
    "MODEL_FOR_DEPTH_ESTIMATION",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MODEL",
)


def names() -> list[str]:
    """Model types that have a model class."""
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for mapping in _PREFERRED:
        found |= set(getattr(modeling_auto, f"{mapping}_MAPPING_NAMES"))
    return sorted(found)


def case(name: str, attention: str, padded: bool, gradients: bool) -> tuple[Case, dict[str, Any]]:
    """The first class of the model type that can be built and run.

    Raises:
        RuntimeError: None can; with the errors.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    overrides = OVERRIDES.get(name, {})
    config = tiny(CONFIG_MAPPING[name], {k: v for k, v in overrides.items() if not k.startswith("_")})
    errors: list[str] = []
    for model_class in _classes(name, config):
        try:
            with torch.device("meta"):
                count = sum(
                    p.numel() for p in model_class._from_config(config, attn_implementation=attention).parameters()
                )
        except Exception as error:
            errors.append(f"{model_class.__name__}: {_line(error)}")
            continue
        if count > MAX_PARAMETERS:
            errors.append(f"{model_class.__name__}: {count / 1e6:.0f} million parameters")
            continue
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=attention).eval()
        randomize(model)
        torch.manual_seed(1)
        sets = [overrides["_inputs"]()] if "_inputs" in overrides else candidates(model, config, padded)
        for arguments in sets:
            try:
                torch.manual_seed(7)
                with torch.no_grad():
                    model(**arguments)
            except Exception as error:
                errors.append(f"{model_class.__name__}({', '.join(arguments)}): {_line(error)}")
                continue
            about = {"class": model_class.__name__, "inputs": list(arguments), "parameters": count}
            return Case(model, arguments, gradients), about
    raise RuntimeError("; ".join(dict.fromkeys(errors)) or "no class")


def _classes(name: str, config: Any) -> Iterator[Any]:
    import transformers
    from transformers.models.auto import modeling_auto

    seen = set()
    own = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    for mapping in _PREFERRED:
        classes = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(name, ())
        for class_name in (classes,) if isinstance(classes, str) else classes:
            found = getattr(transformers, class_name, None) or getattr(own, class_name, None)
            if found is not None and class_name not in seen:
                seen.add(class_name)
                yield found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
