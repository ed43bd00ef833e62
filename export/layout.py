"""Where a build puts its graphs in the engine directory."""

from collections.abc import Mapping
from dataclasses import replace

from calibration.precisions.base import NATIVE, ONNXRUNTIME, Operator
from calibration.precisions.catalog import precision_of, refusal
from engines.contract import TIERED_CACHE
from engines.onnxruntime.files import OnnxRuntimeFiles
from plugins.cpu.packing import MOST_INPUTS
from quasar.checkpoints import DecoderSpec

CANONICAL = "verifier.onnx"
# At least so many, and one layer of each window that a layer has: attention with a window may sum in another order.
_PROBE_LAYERS = 2
# The largest head of VerifyAttention.
MOST_HEAD_SIZE = 256
_ONNXRUNTIME = OnnxRuntimeFiles(
    graph="onnxruntime/verifier.onnx",
    probe="onnxruntime/probe.onnx",
    probe_layers=_PROBE_LAYERS,
    integer_check="onnxruntime/integer_check.onnx",
    weights="onnxruntime/verifier.onnx.data",
    native_graph="onnxruntime/native.onnx",
    native_probe="onnxruntime/native_probe.onnx",
    native_draft="onnxruntime/native_draft.onnx",
    native_weights="onnxruntime/native.onnx.data",
)


def onnxruntime_files(spec: DecoderSpec, linears: Mapping[str, str], kv_dtype: str = "float32") -> OnnxRuntimeFiles:
    """ONNX Runtime's graphs of an engine with these layers, precisions and cache; "" for those that it does not need.

    It drafts for itself with coarser activations, or on the upper tier of its cache, where it has either.
    """
    files = replace(_ONNXRUNTIME, probe_layers=_num_probe_layers(spec))
    if not any(isinstance(precision_of(name).lowering(ONNXRUNTIME), Operator) for name in set(linears.values())):
        files = replace(files, weights="")
    if kv_dtype != TIERED_CACHE and not any(precision_of(name).drafts_as for name in set(linears.values())):
        files = replace(files, native_draft="")
    if native_takes(spec) and not refusal(linears.values(), NATIVE):
        return files
    return replace(files, native_graph="", native_probe="", native_draft="", native_weights="")


def native_takes(spec: DecoderSpec) -> bool:
    """Whether the native operators run this decoder: heads of up to 256 values, linears of up to 65536 inputs."""
    return spec.head_size <= MOST_HEAD_SIZE and max(linear.inputs for linear in spec.linears()) <= MOST_INPUTS


def _num_probe_layers(spec: DecoderSpec) -> int:
    windows = [layer.attention.window for layer in spec.layers]
    return max(min(_PROBE_LAYERS, spec.num_layers), *(windows.index(window) + 1 for window in windows))
