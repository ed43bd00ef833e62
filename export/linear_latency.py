"""The latency of a linear in a verify pass on this machine, at each precision: whole operators, one by one."""

import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from calibration.precision_search import LinearLatency
from calibration.precisions.base import Precision
from calibration.precisions.catalog import ladder
from calibration.weights import PreparedLinear
from engines.onnxruntime.session_options import session_options
from export.builder import GraphBuilder
from export.linears import add_linear
from export.passes import LinearsToNative, LinearsToOnnxRuntime, StoredWeights, UnsignedActivations
from export.weight_file import WeightFile
from quasar.checkpoints import DecoderSpec

if TYPE_CHECKING:
    from engines.onnxruntime.kernels import Kernels

# A verify pass of a pending token and seven drafts.
WIDTH = 8
_REPEATS = 9
# Copies of a linear, so that its weights come from memory as in a whole pass.
_STREAMED_BYTES = 48 << 20
_MOST_COPIES = 64


def measure_linear_latency(
    spec: DecoderSpec, kernels: "Kernels", on_shape: Callable[[int], None] = lambda count: None
) -> LinearLatency:
    """Linear → precision → milliseconds in a pass of width 8. Linears of one shape are timed once."""
    shapes = {(linear.inputs, linear.outputs) for linear in spec.linears()}
    latency = {}
    for shape in sorted(shapes):
        latency[shape] = _latency(*shape, kernels)
        on_shape(1)
    return {linear.name: latency[linear.inputs, linear.outputs] for linear in spec.linears()}


def _latency(inputs: int, outputs: int, kernels: "Kernels") -> dict[str, float]:
    precisions = [one for one in ladder() if inputs % one.input_multiple == 0]
    copies = max(1, min(_MOST_COPIES, _STREAMED_BYTES // (inputs * outputs)))
    x = np.random.default_rng(0).standard_normal((1, WIDTH, inputs)).astype(np.float32)
    taken: dict[str, list[float]] = {precision.name: [] for precision in precisions}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            precision.name: _session(Path(folder), precision, inputs, outputs, copies, kernels)
            for precision in precisions
        }
        # The first round warms up; precisions are interleaved, so that a slow moment does not fall on one of them.
        for _ in range(1 + _REPEATS):
            for precision, session in sessions.items():
                start = time.perf_counter()
                session.run(None, {"x": x})
                taken[precision].append(time.perf_counter() - start)
        del sessions
    return {precision: 1e3 * median(seconds[1:]) / copies for precision, seconds in taken.items()}


def _session(folder: Path, precision: Precision, inputs: int, outputs: int, copies: int, kernels: "Kernels") -> Any:
    """A session over copies of one linear, all of which read the same input."""
    import onnxruntime as ort

    random = np.random.default_rng(1)
    weight = random.standard_normal((outputs, inputs)).astype(np.float32)
    graph = GraphBuilder()
    x = graph.input("x", ir.DataType.FLOAT, [1, "tokens", inputs])
    path = folder / f"{precision.name}.onnx"
    with WeightFile(folder / f"{precision.name}.data") as weights:
        linear = PreparedLinear(precision=precision, weight=precision.quantize(weight), bias=None)
        for copy in range(copies):
            y = add_linear(graph, weights, f"linear.{copy}", x, linear, f"y.{copy}")
            graph.output(y, ir.DataType.FLOAT, [1, "tokens", outputs])
        model = graph.model("latency", version("quasar-verifier"))
    passes: Sequence[Callable[[StoredWeights], Any]] = (
        [LinearsToNative] if kernels.library is not None else [LinearsToOnnxRuntime]
    )
    with WeightFile(folder / f"{precision.name}.lowered.data") as weights:
        for make in passes:
            make(StoredWeights(weights))(model)
    UnsignedActivations()(model)
    ir.save(model, path)
    options = session_options(threads=0, exact_integers=False, library=kernels.library)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
