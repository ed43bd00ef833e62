"""Finding a quantized linear in a canonical graph (`export.linears`), for the passes that replace it."""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from calibration.recipe import LinearPrecision
from export.passes.walk import consumer, input_of, producer


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """A linear without its bias.

    `weight` int8 [K, N]; `scale` float32 [N], or [K / 32, N] in blocks; `x_readers`: nodes of the linear that read `x`.
    """

    name: str
    precision: LinearPrecision
    x: ir.Value
    weight: ir.Value
    scale: ir.Value
    product: ir.Value
    x_readers: int


def quantized_linears(graph: ir.Graph, *precisions: LinearPrecision) -> Iterator[QuantizedLinear]:
    """Every linear of those precisions; raises `PreconditionError` for a form that is not canonical.

    Each is looked at when its turn comes: those before it may have been replaced by then.
    """
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        linear = _match(node)
        if linear.precision in precisions:
            yield linear


def _match(quantize: ir.Node) -> QuantizedLinear:
    rounded = consumer(quantize.outputs[0], "DequantizeLinear").outputs[0]
    source = input_of(quantize, 0)
    unit = source.producer()
    if unit is None or unit.op_type != "Div" or not str(unit.name).endswith(".unit"):
        matmul = consumer(rounded, "MatMul")
        return _linear(quantize, "w8a8-static", source, matmul, matmul.outputs[0], x_readers=1)
    x = input_of(unit, 0)
    blocks = x.producer()
    if blocks is not None and str(blocks.name).endswith(".blocks"):
        merged = consumer(consumer(rounded, "Mul").outputs[0], "Reshape").outputs[0]
        matmul = consumer(merged, "MatMul")
        return _linear(quantize, "w8a8-block", input_of(blocks, 0), matmul, matmul.outputs[0], x_readers=1)
    matmul = consumer(rounded, "MatMul")
    product = consumer(matmul.outputs[0], "Mul").outputs[0]
    return _linear(quantize, "w8a8-token", x, matmul, product, x_readers=2)


def _linear(
    quantize: ir.Node, precision: LinearPrecision, x: ir.Value, matmul: ir.Node, product: ir.Value, *, x_readers: int
) -> QuantizedLinear:
    weight = producer(input_of(matmul, 1), "DequantizeLinear")
    return QuantizedLinear(
        name=str(quantize.name).removesuffix(".quantized"),
        precision=precision,
        x=x,
        weight=input_of(weight, 0),
        scale=input_of(weight, 1),
        product=product,
        x_readers=x_readers,
    )
