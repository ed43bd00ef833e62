"""A token's amax and its quantization as one operator, for back ends that have it (`plugins`: quantize_per_token)."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from export.builder import GraphBuilder
from export.passes.walk import prune

DOMAIN = "quasar"
OPERATOR = "quantize_per_token"


class FuseTokenQuantization(InPlacePass):
    """Abs → ReduceMax → Clip, Div → QuantizeLinear of a linear's input become `quasar::quantize_per_token`.

    Its outputs are the two values that others read: the integers and the token's amax. TensorRT's parser
    finds the plugin by the attributes.
    """

    def ensures(self, model: ir.Model) -> None:
        """No quantization is left in standard operators."""
        if any(node.op_type == "QuantizeLinear" for node in model.graph):
            raise PostconditionError("a QuantizeLinear node is left")

    def call(self, model: ir.Model) -> PassResult:
        """Replace every QuantizeLinear and what makes its input."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "QuantizeLinear"]
        for node in nodes:
            unit = _producer(node, 0, "Div")
            amax = _producer(unit, 1, "Clip")
            x = unit.inputs[0]
            assert x is not None
            name = str(node.name).removesuffix(".quantized")
            new = GraphBuilder()
            quantized, largest = new.ops(
                OPERATOR,
                [x],
                f"{name}.quantize_per_token",
                [f"{name}.integers", f"{name}.row_amax"],
                {"plugin_namespace": DOMAIN, "plugin_version": "1"},
                domain=DOMAIN,
            )
            quantized.type = ir.TensorType(ir.DataType.INT8)
            largest.type = ir.TensorType(ir.DataType.FLOAT)
            ir.convenience.replace_all_uses_with(node.outputs[0], quantized)
            ir.convenience.replace_all_uses_with(amax.outputs[0], largest)
            graph.insert_after(node, new.nodes)
        if nodes:
            graph.opset_imports[DOMAIN] = 1
            prune(model)
        return PassResult(model, modified=bool(nodes))


def _producer(node: ir.Node, index: int, kind: str) -> ir.Node:
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != kind:
        raise PostconditionError(f"{node.name} is not the per-token quantization of the canonical graph")
    return producer
