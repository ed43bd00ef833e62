"""Where a build puts its graphs in the engine directory."""

from engines.manifest import OnnxRuntimeFiles

CANONICAL = "verifier.onnx"
PROBE_LAYERS = 2
ONNXRUNTIME = OnnxRuntimeFiles(
    graph="onnxruntime/verifier.onnx",
    probe="onnxruntime/probe.onnx",
    probe_layers=PROBE_LAYERS,
    integer_check="onnxruntime/integer_check.onnx",
    weights="onnxruntime/verifier.onnx.data",
    native_graph="onnxruntime/native.onnx",
    native_probe="onnxruntime/native_probe.onnx",
    native_weights="onnxruntime/native.onnx.data",
)
