"""One native operator as an ONNX graph of its own, run on a forced instruction level."""

import functools
import os
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from plugins.cpu import toolchain
from plugins.cpu.library import find_library
from quasar.errors import QuasarError

needs_library = pytest.mark.skipif(not toolchain.LIBRARY.is_file(), reason="no C++ compiler: no native operators")


def usable_levels() -> list[str]:
    """The levels that this CPU runs, best first."""
    if not toolchain.LIBRARY.is_file():
        return []
    levels = []
    for level in ("avx512-vnni", "avx-vnni", "avx2", "neon-dot", "portable"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QUASAR_CPU_LEVEL", level)
            try:
                levels.append(find_library().level)
            except QuasarError:
                continue
    return levels


LEVELS = usable_levels()


@functools.lru_cache(maxsize=64)
def _session(model: bytes, level: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    before = os.environ.get("QUASAR_CPU_LEVEL")
    os.environ["QUASAR_CPU_LEVEL"] = level
    try:
        options.register_custom_ops_library(str(toolchain.LIBRARY))
        # Kernels take the level when they are made.
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    finally:
        os.environ.pop("QUASAR_CPU_LEVEL")
        if before is not None:
            os.environ["QUASAR_CPU_LEVEL"] = before


def run_operator(
    name: str,
    inputs: list[np.ndarray | None],
    attributes: Mapping[str, Any],
    *,
    level: str,
    outputs: int = 1,
    in_place: Mapping[int, int] | None = None,
    threads: int = 1,
    constant: Collection[int] = (),
) -> list[np.ndarray]:
    """Run a node of domain quasar.cpu; None leaves an input out.

    `in_place`: output → the input whose memory and type it shares; the others are float32. `constant`: inputs that are
    initializers, as weights are.
    """
    shared = in_place or {}
    values = [
        None
        if array is None
        else ir.Value(
            name=f"input_{index}",
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape([f"extent_{index}_{axis}" for axis in range(array.ndim)]),
        )
        for index, array in enumerate(inputs)
    ]
    made = [
        ir.Value(
            name=f"output_{index}",
            type=values[shared[index]].type if index in shared else ir.TensorType(ir.DataType.FLOAT),
        )
        for index in range(outputs)
    ]
    node = ir.node(name, values, attributes, domain="quasar.cpu", outputs=made, name="node")
    initializers = []
    for index in constant:
        values[index].const_value = ir.tensor(inputs[index], name=values[index].name)
        values[index].shape = ir.Shape(inputs[index].shape)
        initializers.append(values[index])
    present = [value for index, value in enumerate(values) if value is not None and index not in constant]
    graph = ir.Graph(
        present, made, nodes=[node], initializers=initializers, opset_imports={"": 24, "quasar.cpu": 1}, name="one"
    )
    session = _session(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), level, threads)
    fed = {value.name: array for value, array in zip(values, inputs, strict=True) if value is not None}
    feed = {value.name: fed[value.name] for value in present}
    if not shared:
        return [np.asarray(result) for result in session.run(None, feed)]
    binding = session.io_binding()
    for value in present:
        array = feed[value.name]
        if array.dtype == ml_dtypes.bfloat16:
            bound = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(ir.DataType.BFLOAT16))
        else:
            bound = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(value.name, bound)
        for output, source in shared.items():
            if values[source] is value:
                binding.bind_ortvalue_output(f"output_{output}", bound)
    own = [index for index in range(outputs) if index not in shared]
    for index in own:
        binding.bind_output(f"output_{index}")
    session.run_with_iobinding(binding)
    # In the order in which they were bound: the shared ones came first.
    results = dict(zip(own, binding.get_outputs()[len(shared) :], strict=True))
    return [
        np.asarray(feed[f"input_{shared[index]}"]) if index in shared else results[index].numpy()
        for index in range(outputs)
    ]
