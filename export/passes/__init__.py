"""Graph changes: each is a pass with a precondition, a postcondition and a truthful `modified`."""

from export.passes.fuse_token_quantization import FuseTokenQuantization
from export.passes.keep_layers import KeepLayers
from export.passes.lower_native import LowerToNative, PackedWeights
from export.passes.lower_onnxruntime import LowerToOnnxRuntime
from export.passes.lower_tensorrt import LowerToTensorRt
from export.passes.unsigned_activations import UnsignedActivations

__all__ = [
    "FuseTokenQuantization",
    "KeepLayers",
    "LowerToNative",
    "LowerToOnnxRuntime",
    "LowerToTensorRt",
    "PackedWeights",
    "UnsignedActivations",
]
