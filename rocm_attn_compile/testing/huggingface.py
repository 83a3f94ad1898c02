"""What differs between the versions of transformers that tests and benchmarks run with."""

from __future__ import annotations

import inspect
from typing import Any


def cache_for(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as the keyword argument of a model's, or its class's, forward.

    Its name is "cache" since transformers 5.24, which warns that the one before, "past_key_values", goes in 5.40.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def cache_of(output: Any) -> Any:
    """The cache in what a model, or its `generate`, returns as a dictionary."""
    return output["cache"] if "cache" in output else output["past_key_values"]
