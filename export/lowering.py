"""The graphs that ONNX Runtime runs, from the canonical one: stock kernels, native operators, and probes of both."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from engines.onnxruntime.files import OnnxRuntimeFiles
from export.integer_check_graph import build_integer_check
from export.passes import (
    CoarserActivations,
    KeepLayers,
    LinearsToOnnxRuntime,
    LowerToNative,
    LowerToOnnxRuntime,
    StoredWeights,
    UnsignedActivations,
)
from export.weight_file import WeightFile
from quasar.checkpoints import DecoderSpec


def lower_for_onnxruntime(
    directory: Path, canonical: str, files: OnnxRuntimeFiles, spec: DecoderSpec, kv_dtype: str = "float32"
) -> None:
    """Write every graph that `files` names from the canonical one in an engine directory; `kv_dtype`: a float type."""

    def write(name: str, *passes: Callable[[ir.Model], object]) -> None:
        model = ir.load(directory / canonical)
        for one in passes:
            one(model)
        ir.save(model, directory / name)

    (directory / files.integer_check).parent.mkdir(exist_ok=True)
    stock: list[Callable[[ir.Model], object]] = [LowerToOnnxRuntime(spec), UnsignedActivations()]
    if files.weights:
        with WeightFile(directory / files.weights, directory) as weights:
            stock = [LinearsToOnnxRuntime(StoredWeights(weights)), *stock]
            write(files.graph, *stock)
            write(files.probe, *stock, KeepLayers(files.probe_layers, spec))
    elif files.graph:
        write(files.graph, *stock)
        write(files.probe, *stock, KeepLayers(files.probe_layers, spec))
    if files.native_graph:
        with WeightFile(directory / files.native_weights, directory) as weights:
            native = [LowerToNative(spec, StoredWeights(weights), kv_dtype), UnsignedActivations()]
            write(files.native_graph, *native)
            if files.native_draft:
                write(files.native_draft, *native, CoarserActivations())
            # The native operators take the final norm in, so the cut comes first.
            write(files.native_probe, KeepLayers(files.probe_layers, spec), *native)
    integer_check = build_integer_check(version("quasar-verifier"))
    UnsignedActivations()(integer_check)
    ir.save(integer_check, directory / files.integer_check)
