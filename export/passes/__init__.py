"""Graph changes: each is a pass with a precondition, a postcondition and a truthful `modified`."""

from export.passes.keep_layers import KeepLayers
from export.passes.lower_onnxruntime import LowerToOnnxRuntime

__all__ = ["KeepLayers", "LowerToOnnxRuntime"]
