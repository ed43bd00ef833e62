"""W8A8 linears per token as one operator after their quantization, for back ends that have it (`integer_linear`)."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from calibration.precisions.token import PerToken
from export.builder import GraphBuilder, initializer
from export.passes.fuse_token_quantization import DOMAIN
from export.passes.quantized_linear import QuantizedLinear, quantized_linears
from export.passes.walk import input_of, insert_after, only_user, other_input, prune
from export.weight_file import WeightFile
from plugins.gpu.packing import INPUT_MULTIPLE, pack_weight
from quasar.errors import BuildError

OPERATOR = "integer_linear"


class IntegerLinears(InPlacePass):
    """Canonical graph: MatMul of dequantized integers, · amax and + bias become `quasar::integer_linear`.

    It reads the token's integers and amax, which stay as they are, and the weight in tiles, which is written to a file
    of its own: tensor cores want the inputs of an output together, and the canonical weight has its outputs together.
    A linear without a bias gets zeros, since a plugin has no optional inputs. Other linears stay as they are.
    """

    def __init__(self, weights: WeightFile) -> None:
        super().__init__()
        self._weights = weights

    def ensures(self, model: ir.Model) -> None:
        """No linear that is W8A8 per token is left."""
        if any(quantized_linears(model.graph, PerToken.name)):
            raise PostconditionError("a linear that is W8A8 per token is left")

    def call(self, model: ir.Model) -> PassResult:
        """Replace every such linear; raises `BuildError` naming one whose inputs are no multiple of 16."""
        modified = False
        for linear in quantized_linears(model.graph, PerToken.name):
            self._replace(model.graph, linear)
            modified = True
        if modified:
            model.graph.opset_imports[DOMAIN] = 1
            prune(model)
        return PassResult(model, modified=modified)

    def _replace(self, graph: ir.Graph, linear: QuantizedLinear) -> None:
        assert linear.weight.const_value is not None
        values = linear.weight.const_value.numpy()
        inputs, outputs = values.shape
        if inputs % INPUT_MULTIPLE:
            raise BuildError(f"{linear.name} has {inputs} inputs; integer_linear takes a multiple of {INPUT_MULTIPLE}")
        quantized, amax = _token(linear)
        bias, output = _bias(linear.product)
        if bias is None:
            bias = initializer(ir.tensor(np.zeros(outputs, np.float32), name=f"{linear.name}.no_bias"))
            graph.register_initializer(bias)
        packed = initializer(self._weights.append(f"{linear.name}.tiles", pack_weight(values.T)))
        graph.register_initializer(packed)
        new = GraphBuilder()
        y = new.op(
            OPERATOR,
            [quantized, amax, packed, linear.scale, bias],
            str(output.name),
            {"plugin_namespace": DOMAIN, "plugin_version": "1"},
            domain=DOMAIN,
        )
        y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), output.shape
        ir.convenience.replace_all_uses_with(output, y, replace_graph_outputs=True)
        insert_after(graph, output, new)


def _token(linear: QuantizedLinear) -> tuple[ir.Value, ir.Value]:
    """The integers and the amax of the linear's tokens."""
    times_amax = linear.product.producer()
    assert times_amax is not None
    product, amax = input_of(times_amax, 0), input_of(times_amax, 1)
    matmul = product.producer()
    assert matmul is not None
    activations = input_of(matmul, 0).producer()
    assert activations is not None
    return input_of(activations, 0), amax


def _bias(product: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """A constant that is added to the product and nothing else, and the sum; or None and the product."""
    add = only_user(product, "Add")
    bias = other_input(add, product) if add is not None else None
    if add is None or bias is None or bias.const_value is None or bias.dtype != ir.DataType.FLOAT:
        return None, product
    return bias, add.outputs[0]
