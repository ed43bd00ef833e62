"""Graph changes: each is a pass with a precondition, a postcondition and a truthful `modified`."""

from export.passes.caches_to_int8 import CachesToInt8
from export.passes.coarser_activations import CoarserActivations
from export.passes.fuse_token_quantization import FuseTokenQuantization
from export.passes.integer_linears import IntegerLinears
from export.passes.keep_layers import KeepLayers
from export.passes.linears_to_native import LinearsToNative
from export.passes.linears_to_onnxruntime import LinearsToOnnxRuntime
from export.passes.lower_native import LowerToNative
from export.passes.lower_onnxruntime import LowerToOnnxRuntime
from export.passes.lower_tensorrt import LowerToTensorRt
from export.passes.stored_weights import StoredWeights
from export.passes.unsigned_activations import UnsignedActivations

__all__ = [
    "CachesToInt8",
    "CoarserActivations",
    "FuseTokenQuantization",
    "IntegerLinears",
    "KeepLayers",
    "LinearsToNative",
    "LinearsToOnnxRuntime",
    "LowerToNative",
    "LowerToOnnxRuntime",
    "LowerToTensorRt",
    "StoredWeights",
    "UnsignedActivations",
]
