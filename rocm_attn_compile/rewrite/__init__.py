"""Put the canonical op in the place of recognised attentions, in Dynamo's own graph."""

from .replace import Rewriter
from .tune import Tuner
from .verify import verify

__all__ = ["Rewriter", "Tuner", "verify"]
