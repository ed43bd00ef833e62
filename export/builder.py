"""A thin hand over onnx_ir: nodes in order, values named after what they hold, initializers kept outside the graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quasar.errors import BuildError

OPSET = 24
IR_VERSION = 11
MICROSOFT = "com.microsoft"


class GraphBuilder:
    """Collects nodes and initializers of one graph; every name is given by the caller and must be new."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value a graph output."""
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def constant(self, name: str, array: NDArray[Any] | Sequence[int] | int) -> ir.Value:
        """A small initializer kept inside the model file; the same name returns the same value. Lists are int64."""
        if name not in self._initializers:
            data = array if isinstance(array, np.ndarray) else np.asarray(array, np.int64)
            self._initializers[name] = initializer(ir.tensor(data, name=name))
        return self._initializers[name]

    def weight(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A large initializer, whose bytes are in the weight file."""
        value = initializer(tensor)
        assert value.name is not None
        if value.name in self._initializers:
            raise ValueError(f"two initializers are named {value.name!r}")
        self._initializers[value.name] = value
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Append a node with one output; node and value take `name`."""
        return self.ops(op_type, inputs, name, [name], attributes, domain=domain)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> list[ir.Value]:
        """Append a node with named outputs."""
        values = [ir.Value(name=output) for output in outputs]
        self.nodes.append(ir.node(op_type, list(inputs), attributes, domain=domain, outputs=values, name=name))
        return values

    @property
    def initializers(self) -> list[ir.Value]:
        """The initializers made so far."""
        return list(self._initializers.values())

    def model(self, name: str, producer_version: str) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": OPSET},
            name=name,
        )
        return ir.Model(
            graph, ir_version=IR_VERSION, producer_name="quasar-verifier", producer_version=producer_version
        )


def initializer(tensor: ir.TensorProtocol) -> ir.Value:
    """A graph value that holds a tensor."""
    return ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape([int(extent) for extent in tensor.shape.numpy()]),
        const_value=tensor,
    )


def check_model(path: Path) -> None:
    """Run `onnx.checker` with full shape inference on a saved model; raises `BuildError` with its first complaint."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"{path} is not a valid ONNX graph: {str(error).splitlines()[0]}") from None
