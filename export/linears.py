"""One linear in the canonical graph, in the form that its precision gives it (`calibration.precisions`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from calibration.weights import PreparedLinear
from export.builder import GraphBuilder
from export.weight_file import WeightFile


def add_linear(
    graph: GraphBuilder, weights: WeightFile, name: str, x: ir.Value, linear: PreparedLinear, output: str
) -> ir.Value:
    """Y = x Wᵀ + bias for x float [..., inputs]; the last node's value takes the name `output`."""
    product = output if linear.bias is None else f"{name}.product"
    written = _WrittenLinear(graph, weights, name, product)
    y: ir.Value = linear.precision.canonical(written, x, linear.weight, linear.static_scale)
    if linear.bias is None:
        return y
    bias = graph.weight(weights.append(f"{name}.bias", linear.bias))
    return graph.op("Add", [y, bias], output)


class _WrittenLinear:
    """A `LinearGraph` over the graph that is built; the product's value takes the name `product`."""

    def __init__(self, graph: GraphBuilder, weights: WeightFile, name: str, product: str) -> None:
        self.name = name
        self._graph = graph
        self._weights = weights
        self._product = product

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], part: str, attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        return self._graph.op(op_type, inputs, f"{self.name}.{part}", attributes)

    def product(self, op_type: str, inputs: Sequence[ir.Value], part: str = "") -> ir.Value:
        node = f"{self.name}.{part}" if part else self._product
        return self._graph.ops(op_type, inputs, node, [self._product])[0]

    def constant(self, name: str, array: NDArray[Any] | Sequence[int]) -> ir.Value:
        return self._graph.constant(name, array)

    def weight(self, part: str, array: NDArray[Any]) -> ir.Value:
        return self._graph.weight(self._weights.append(f"{self.name}.{part}", array))
