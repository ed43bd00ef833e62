"""Quantized linears as native operators of `plugins/cpu`, with their neighbours."""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from calibration.precisions.base import NATIVE, Operator
from export.builder import GraphBuilder
from export.passes.quantized_linear import QuantizedLinear, linears_with_operator
from export.passes.stored_weights import StoredWeights
from export.passes.walk import consumer, input_of, insert_after, only_user, other_input, prune
from plugins.w8a8_linear import GELU, NO_GATE, SILU


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """A quantized linear with the neighbours that the operator takes in."""

    core: QuantizedLinear
    operator: Operator
    bias: ir.Value | None
    residual: ir.Value | None
    norm: ir.Node | None
    gate: int
    output: ir.Value


class LinearsToNative(InPlacePass):
    """Linears for which a precision names a native operator → that operator; others stay as they are.

    A linear becomes one node with its bias, the RMS norm before it where nothing else reads that, and the residual sum
    or the gate after it. Where a norm stands between it and the residual sum, both stay as they are.
    """

    def __init__(self, weights: StoredWeights) -> None:
        super().__init__()
        self._weights = weights

    def ensures(self, model: ir.Model) -> None:
        """None of those linears is left."""
        if any(linears_with_operator(model.graph, NATIVE)):
            raise PostconditionError("a quantized linear is left")

    def call(self, model: ir.Model) -> PassResult:
        """Replace every such linear."""
        modified = False
        for linear, operator in linears_with_operator(model.graph, NATIVE):
            self._lower(model.graph, _with_neighbours(linear, operator))
            model.graph.opset_imports[operator.domain] = 1
            modified = True
        if modified:
            model.graph.sort()
            prune(model)
        return PassResult(model, modified=modified)

    def _lower(self, graph: ir.Graph, linear: _Linear) -> None:
        core, operator, gate = linear.core, linear.operator, linear.gate
        packed, scale = self._weights.packed(graph, core, operator, "packed", "packed_scales", gated=gate != NO_GATE)
        x, norm_weight, epsilon = core.x, None, 0.0
        if linear.norm is not None:
            x, norm_weight = input_of(linear.norm, 0), input_of(linear.norm, 1)
            epsilon = linear.norm.attributes["epsilon"].as_float()
        assert core.weight.shape is not None
        inputs, columns = (int(extent) for extent in core.weight.shape.numpy())
        new = GraphBuilder()
        y = new.op(
            operator.op_type,
            [x, packed, scale, linear.bias, linear.residual, norm_weight],
            str(linear.output.name),
            {
                "outputs": columns // 2 if gate != NO_GATE else columns,
                "gate": gate,
                "epsilon": epsilon,
                **operator.attributes(columns, inputs),
            },
            domain=operator.domain,
        )
        y.type, y.shape = linear.output.type, linear.output.shape
        ir.convenience.replace_all_uses_with(linear.output, y, replace_graph_outputs=True)
        insert_after(graph, linear.output, new)


def _with_neighbours(core: QuantizedLinear, operator: Operator) -> _Linear:
    output = core.product
    bias = residual = None
    add = only_user(output, "Add")
    if add is not None and (other := other_input(add, output)).const_value is not None:
        bias, output = other, add.outputs[0]
        add = only_user(output, "Add")
    split = only_user(output, "Split")
    gate = NO_GATE if split is None else _gate_of(split)
    if split is not None and gate != NO_GATE:
        output = consumer(split.outputs[1], "Mul").outputs[0]
    elif add is not None:
        residual, output = other_input(add, output), add.outputs[0]
    norm = core.x.producer()
    if norm is None or norm.op_type != "RMSNormalization" or len(core.x.uses()) != core.x_readers:
        norm = None
    return _Linear(core=core, operator=operator, bias=bias, residual=residual, norm=norm, gate=gate, output=output)


def _gate_of(split: ir.Node) -> int:
    """What the operator calls a split of [gate, up]; `NO_GATE` where it is another split, or an activation it lacks."""
    if split.attributes.get("num_outputs") is None:
        return NO_GATE
    kinds = {node.op_type: node for node in split.outputs[0].consumers()}
    if "Sigmoid" in kinds:
        return SILU
    if "Gelu" in kinds and kinds["Gelu"].attributes["approximate"].as_string() == "tanh":
        return GELU
    return NO_GATE
