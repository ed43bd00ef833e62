"""Finding quantized linears in a canonical graph: where the form that a precision writes stands."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import PreconditionError

from calibration.precisions.base import Lowering, Operator, Precision
from calibration.precisions.catalog import PRECISIONS
from export.passes.walk import only_user
from quasar.numerics import QuantizedWeight

_WEIGHT, _SCALE, _OFFSET = ".weight", ".scale", ".offset"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """A linear without its bias.

    `precision`: its name; `weight` int8 [K, N]; `scale` float32 [N], or [K / 32, N] in blocks; `offset` the same, or
    None; `x_readers`: nodes of the linear that read `x`.
    """

    name: str
    precision: str
    x: ir.Value
    weight: ir.Value
    scale: ir.Value
    offset: ir.Value | None
    product: ir.Value
    x_readers: int


def linears_with_operator(graph: ir.Graph, backend: str) -> Iterator[tuple[QuantizedLinear, Operator]]:
    """Every linear in whose place a back end has an operator, with that; as `quantized_linears`."""
    lowerings = {name: precision.lowering(backend) for name, precision in PRECISIONS.items()}
    names = [name for name, lowering in lowerings.items() if isinstance(lowering, Operator)]
    for linear in quantized_linears(graph, *names):
        yield linear, _operator(lowerings[linear.precision])


def quantized_linears(graph: ir.Graph, *precisions: str) -> Iterator[QuantizedLinear]:
    """Every linear of those precisions, in graph order; raises `PreconditionError` for a form that is not canonical.

    A linear is looked up when the iterator reaches it: the ones before may have been replaced by then.
    """
    values = {str(value.name): value for node in graph for value in node.outputs}
    tensors = dict(graph.initializers)
    for tensor in tensors:
        name = tensor.removesuffix(_WEIGHT)
        if name != tensor and f"{name}{_SCALE}" in tensors:
            linear = _find(name, tensors, values)
            if linear.precision in precisions:
                yield linear


def _operator(lowering: Lowering) -> Operator:
    assert isinstance(lowering, Operator)
    return lowering


def _find(name: str, tensors: Mapping[str, ir.Value], values: Mapping[str, ir.Value]) -> QuantizedLinear:
    weight, scale, offset = tensors[f"{name}{_WEIGHT}"], tensors[f"{name}{_SCALE}"], tensors.get(f"{name}{_OFFSET}")
    for precision in PRECISIONS.values():
        if not precision.is_quantized or precision.has_offsets != (offset is not None):
            continue
        if (found := _Form(name, precision, weight, scale, offset).match(values)) is not None:
            x, product, x_readers = found
            return QuantizedLinear(
                name=name,
                precision=precision.name,
                x=x,
                weight=weight,
                scale=scale,
                offset=offset,
                product=product,
                x_readers=x_readers,
            )
    raise PreconditionError(f"{name} stands in the form of no known precision: this is no canonical linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    op_type: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class _Form:
    """A `LinearGraph` that notes what a precision would write: nodes by output, tensors and values by name."""

    _X = "x of the linear"

    def __init__(
        self, name: str, precision: Precision, weight: ir.Value, scale: ir.Value, offset: ir.Value | None
    ) -> None:
        self.name = name
        self._nodes: dict[str, _Node] = {}
        self._product: _Node
        self._stored = {f"{name}{_WEIGHT}": weight.dtype, f"{name}{_SCALE}": scale.dtype}
        if offset is not None:
            self._stored[f"{name}{_OFFSET}"] = offset.dtype
        self._types: dict[str, ir.DataType] = {}
        # The form follows from shapes: arrays of one element, seen as large ones.
        zeros = QuantizedWeight(
            values=np.broadcast_to(np.int8(0), _shape(weight)[::-1]),
            scale=np.broadcast_to(np.float32(0), _shape(scale)[::-1]),
            offset=None if offset is None else np.broadcast_to(np.float32(0), _shape(offset)[::-1]),
        )
        precision.canonical(self, self._X, zeros, 0.0)

    def op(self, op_type: str, inputs: Sequence[str], part: str, attributes: Mapping[str, Any] | None = None, /) -> str:
        output = f"{self.name}.{part}"
        self._nodes[output] = _Node(op_type=op_type, inputs=tuple(inputs), attributes=dict(attributes or {}))
        return output

    def product(self, op_type: str, inputs: Sequence[str], _part: str = "", /) -> str:
        self._product = _Node(op_type=op_type, inputs=tuple(inputs))
        return ""

    def constant(self, name: str, _array: NDArray[Any] | Sequence[int], /) -> str:
        return name

    def weight(self, part: str, array: NDArray[Any], /) -> str:
        name = f"{self.name}.{part}"
        self._types[name] = ir.DataType.from_numpy(array.dtype)
        return name

    def match(self, values: Mapping[str, ir.Value]) -> tuple[ir.Value, ir.Value, int] | None:
        """X, the product, and how many nodes read x, if the form stands in the graph with these values."""
        if self._types != self._stored:
            return None
        pairs = [
            (values[output].producer() if output in values else None, node) for output, node in self._nodes.items()
        ]
        # The product's name is not the linear's own: it is found by an input that nothing else reads.
        read = [name for node in self._nodes.values() for name in node.inputs]
        inner = next(name for name in self._product.inputs if name in self._nodes and name not in read)
        if inner in values:
            pairs.append((only_user(values[inner], self._product.op_type), self._product))
        xs: list[ir.Value] = []
        for made, node in pairs:
            if made is None or made.op_type != node.op_type or len(made.inputs) != len(node.inputs):
                return None
            if any(
                name not in made.attributes or made.attributes[name].value != node.attributes[name]
                for name in node.attributes
            ):
                return None
            for value, name in zip(made.inputs, node.inputs, strict=True):
                if value is None or (name != self._X and value.name != name):
                    return None
                if name == self._X:
                    xs.append(value)
        if not xs or any(value is not xs[0] for value in xs):
            return None
        last = pairs[-1][0]
        assert last is not None
        return xs[0], last.outputs[0], sum(self._X in node.inputs for _, node in pairs)


def _shape(tensor: ir.Value) -> tuple[int, ...]:
    assert tensor.shape is not None
    return tuple(int(extent) for extent in tensor.shape.numpy())
