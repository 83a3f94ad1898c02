"""Capture: from Dynamo's graph to a functional SSA of ATen calls that knows where each value came from."""

from rocm_attn_compile.capture.capture import capture
from rocm_attn_compile.capture.dump import dump
from rocm_attn_compile.capture.expand import Expansion, expand
from rocm_attn_compile.capture.trace import LEAF_OPS, WHOLE_OPS, NodeTensor, Storage, Trace, Value

__all__ = ["LEAF_OPS", "WHOLE_OPS", "Expansion", "NodeTensor", "Storage", "Trace", "Value", "capture", "dump", "expand"]
