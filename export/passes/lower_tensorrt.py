"""Lowering to TensorRT: 16-bit values around the matmuls and in the cache, float32 between them, additive masks."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from engines import contract as names
from engines.contract import Contract
from engines.tensorrt.plans import ComputeType
from export import names as inner
from export.builder import GraphBuilder, initializer
from export.passes.walk import input_of, prune
from quasar.numerics import QMAX

_TYPES = {
    "float16": (ir.DataType.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "float32": (ir.DataType.FLOAT, np.dtype(np.float32)),
}
_FLOAT = ir.DataType.FLOAT
# Attention's input that holds the mask.
_MASK_INPUT = 3
# Added to the score of a hidden slot: exp underflows to exactly 0, and no float16 sum with a score overflows.
_HIDDEN = -30000.0
# Room between a matmul's largest possible float16 result and what float16 holds: the rounding of two scales.
_HEADROOM = 0.99


class LowerToTensorRt(InPlacePass):
    """Canonical graph → strongly typed graph of one batch and a fixed capacity, for TensorRT and TensorRT-RTX.

    Matmuls, attention and the KV cache are of the compute type. What stands between them is float32, which adds no
    latency, since TensorRT fuses it: the residual stream, norms, rotation, the per-token scales and their quantization.
    Attention gets an additive mask with `is_causal` 0: with 1, TensorRT aligns the new positions with the cache's first
    slots. Its softmax is TensorRT's own (the parser refuses `softmax_precision`); with a soft cap, which the parser
    refuses as well, attention is spelled out. Every DequantizeLinear gets a scale of its own, in the compute type; in
    float16 a channel whose scale would be subnormal, or whose sum could overflow,
    is rescaled by a power of two, which a factor after the matmul takes back.
    """

    def __init__(self, contract: Contract, compute_type: ComputeType = "float16") -> None:
        super().__init__()
        self._contract = contract
        self._ir_type, self._dtype = _TYPES[compute_type]
        self.rescaled_channels = 0

    def requires(self, model: ir.Model) -> None:
        """A canonical graph: every layer's Attention under its name, and a mask."""
        found = {node.name for node in model.graph if node.op_type == "Attention"}
        expected = {inner.attention(layer) for layer in range(self._contract.num_layers)}
        if found != expected:
            raise PreconditionError(f"Attention nodes {sorted(map(str, found ^ expected))} are missing or unknown")
        if inner.MASK not in {value.name for node in model.graph for value in node.outputs}:
            raise PreconditionError(f"the graph has no value {inner.MASK!r}")

    def ensures(self, model: ir.Model) -> None:
        """Caches are of the compute type, and no two DequantizeLinear nodes share a scale."""
        for value in [*model.graph.inputs, *model.graph.outputs]:
            if _is_cache(value) and value.dtype != self._ir_type:
                raise PostconditionError(f"{value.name} is {value.dtype}; {self._ir_type} was expected")
        scales = [node.inputs[1] for node in model.graph if node.op_type == "DequantizeLinear"]
        if len({id(scale) for scale in scales}) != len(scales):
            raise PostconditionError("two DequantizeLinear nodes share a scale")

    def call(self, model: ir.Model) -> PassResult:
        """Fix shapes, retype, and give every matmul and attention its casts."""
        graph = model.graph
        self._graph = graph
        self._fix_shapes()
        for node in list(graph):
            match node.op_type:
                case "MatMul":
                    self._matmul(node)
                case "Attention":
                    self._scale_queries(node)
                    self._cast_input(node, 0)
                    self._cast_output(node)
                case "TensorScatter":
                    self._cast_input(node, 1)
                case "Gather" if node.inputs[0] is not None and node.inputs[0].name in graph.initializers:
                    self._embedding(node)
        self._additive_masks()
        for node in [node for node in graph if node.op_type == "Attention" and "softcap" in node.attributes]:
            self._spell_out(node)
        prune(model)
        return PassResult(model, modified=True)

    def _fix_shapes(self) -> None:
        """IKVCacheUpdateLayer wants a cache of constant shape; a pass serves one request."""
        fixed = {"batch": self._contract.max_batch, "capacity": self._contract.capacity}
        for value in [*self._graph.inputs, *self._graph.outputs]:
            if _is_cache(value):
                value.type = ir.TensorType(self._ir_type)
            assert value.shape is not None
            extents = [extent if isinstance(extent, int) else extent.value for extent in value.shape]
            value.shape = ir.Shape([fixed.get(str(extent), extent) for extent in extents])

    def _matmul(self, node: ir.Node) -> None:
        activations, weight = (value.producer() if value is not None else None for value in node.inputs)
        if weight is not None and weight.op_type == "DequantizeLinear" and "block_size" in weight.attributes:
            # Weights of 4 bits in groups, times activations as they are.
            self._cast_input(node, 0)
            self._own_scale(weight, _constant(weight.inputs[1]))
            self._cast_output(node)
            return
        if activations is None or weight is None or weight.op_type != "DequantizeLinear":
            self._cast_input(node, 0)
            self._cast_input(node, 1)
            self._cast_output(node)
            return
        step = _constant(activations.inputs[1])
        self._own_scale(activations, step)
        factor = self._rescaling(weight, QMAX * float(step))
        self._own_scale(weight, _constant(weight.inputs[1]) * factor)
        self._cast_output(node, None if (factor == 1).all() else np.float32(1) / factor)

    def _rescaling(self, weight: ir.Node, largest_input: float) -> NDArray[np.float32]:
        """Per channel a power of two that keeps its scale normal and its largest possible sum finite in float16.

        `largest_input`: of the dequantized activations, 1 for scales per token.
        """
        scale = _constant(weight.inputs[1])
        factor = np.ones_like(scale)
        if self._dtype != np.float16:
            return factor
        limits = np.finfo(np.float16)
        values = _constant(weight.inputs[0])
        largest = np.abs(values.astype(np.int32)).sum(axis=0) * scale * np.float32(largest_input)
        small, large = scale < limits.smallest_normal, largest > _HEADROOM * float(limits.max)
        factor[small] = 2.0 ** np.ceil(np.log2(float(limits.smallest_normal) / scale[small]))
        factor[large] = 2.0 ** np.floor(np.log2(_HEADROOM * float(limits.max) / largest[large]))
        self.rescaled_channels += int((factor != 1).sum())
        return factor

    def _own_scale(self, node: ir.Node, scale: NDArray[Any]) -> None:
        """Give a DequantizeLinear a scale initializer of its own; its type becomes the output's."""
        node.replace_input_with(1, self._constant(f"{node.name}.scale", scale.astype(self._dtype)))

    def _scale_queries(self, node: ir.Node) -> None:
        """Scale the queries in float32: TensorRT would scale them and the whole cache by the root, in 16 bits."""
        if self._ir_type == _FLOAT:
            return
        new = GraphBuilder()
        node.replace_input_with(0, self._scaled(new, node))
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        self._graph.insert_before(node, new.nodes)

    def _scaled(self, new: GraphBuilder, node: ir.Node) -> ir.Value:
        """An Attention's queries times the factor on its scores."""
        own = node.attributes.get("scale")
        scale = self._contract.head_size**-0.5 if own is None else own.as_float()
        factor = self._constant(f"{node.name}.scale", np.asarray(scale, np.float32))
        return new.op("Mul", [input_of(node, 0), factor], f"{node.name}.scaled_queries")

    def _spell_out(self, node: ir.Node) -> None:
        """Attention with a soft cap, which TensorRT's operator lacks: products in the compute type, float32 between.

        Query heads that share a kv head are rows of one product; the queries are scaled already.
        """
        new, at = GraphBuilder(), node.name
        queries, keys, values, mask = (input_of(node, index) for index in range(_MASK_INPUT + 1))
        groups, size, slots = self._contract.num_kv_heads, self._contract.head_size, self._contract.capacity

        def shape(name: str, *extents: int) -> ir.Value:
            return self._shared(f"attention.{name}", np.asarray(extents, np.int64))

        def cast(value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
            return value if self._ir_type == _FLOAT else new.op("Cast", [value], f"{at}.{name}", {"to": int(kind)})

        if self._ir_type == _FLOAT:
            queries = self._scaled(new, node)
        heads = new.op("Shape", [queries], f"{at}.shape", {"start": 0, "end": 2})
        rows = new.op("Reshape", [queries, shape("query_rows", 0, groups, -1, size)], f"{at}.query_rows")
        columns = new.op("Transpose", [keys], f"{at}.key_columns", {"perm": [0, 1, 3, 2]})
        products = cast(new.op("MatMul", [rows, columns], f"{at}.products"), _FLOAT, "products.float32")
        by_head = new.op("Concat", [heads, shape("slots", -1, slots)], f"{at}.score_shape", {"axis": 0})
        scores = new.op("Reshape", [products, by_head], f"{at}.scores")
        cap = self._constant(f"{at}.cap", np.asarray(node.attributes["softcap"].as_float(), np.float32))
        bounded = new.op("Tanh", [new.op("Div", [scores, cap], f"{at}.divided")], f"{at}.bounded")
        capped = new.op("Mul", [bounded, cap], f"{at}.capped")
        masked = new.op("Add", [capped, cast(mask, _FLOAT, "mask")], f"{at}.masked")
        weights = cast(new.op("Softmax", [masked], f"{at}.softmax", {"axis": -1}), self._ir_type, "weights")
        weight_rows = new.op("Reshape", [weights, shape("weight_rows", 0, groups, -1, slots)], f"{at}.weight_rows")
        summed = new.op("MatMul", [weight_rows, values], f"{at}.summed")
        context_shape = new.op("Concat", [heads, shape("values", -1, size)], f"{at}.context_shape", {"axis": 0})
        context = new.op("Reshape", [summed, context_shape], f"{at}.by_head")
        ir.convenience.replace_all_uses_with(node.outputs[0], context)
        self._graph.insert_after(node, new.nodes)

    def _shared(self, name: str, array: NDArray[Any]) -> ir.Value:
        found = self._graph.initializers.get(name)
        return self._constant(name, array) if found is None else found

    def _embedding(self, node: ir.Node) -> None:
        """Keep a 16-bit table as it is; a float32 one is read in the compute type."""
        table = node.inputs[0]
        assert table is not None
        if table.dtype == _FLOAT:
            self._cast_input(node, 0)
            self._cast_output(node)

    def _additive_masks(self) -> None:
        """What every Attention adds to its scores, one value for each mask: of all slots, and of each window."""
        seen = self._constant("mask.seen_score", np.asarray(0, self._dtype))
        hidden = self._constant("mask.hidden_score", np.asarray(_HIDDEN, self._dtype))
        attention = [node for node in self._graph if node.op_type == "Attention"]
        for mask in dict.fromkeys(input_of(node, _MASK_INPUT) for node in attention):
            new = GraphBuilder()
            additive = new.op("Where", [mask, seen, hidden], f"{mask.name}.additive")
            for node in attention:
                if node.inputs[_MASK_INPUT] is mask:
                    node.replace_input_with(_MASK_INPUT, additive)
            producer = mask.producer()
            assert producer is not None
            self._graph.insert_after(producer, new.nodes)

    def _cast_input(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None
        if self._ir_type == _FLOAT and value.dtype in (None, _FLOAT):
            return
        new = GraphBuilder()
        node.replace_input_with(
            index, new.op("Cast", [value], f"{node.name}.input_{index}", {"to": int(self._ir_type)})
        )
        self._graph.insert_before(node, new.nodes)

    def _cast_output(self, node: ir.Node, factor: NDArray[Any] | None = None) -> None:
        """Whoever reads the node's output reads it in float32, times `factor` per channel."""
        if self._ir_type == _FLOAT and factor is None:
            return
        old, new = node.outputs[0], GraphBuilder()
        result = new.op("Cast", [old], f"{node.name}.float32", {"to": int(_FLOAT)})
        if factor is not None:
            restored = self._constant(f"{node.name}.channel_factor", factor.astype(np.float32))
            result = new.op("Mul", [result, restored], f"{node.name}.restored")
        is_output = old in self._graph.outputs
        if is_output:
            # The contract's name stays with what leaves the graph.
            name, old.name = old.name, f"{node.name}.product"
            result.name, result.type, result.shape = name, old.type, old.shape
            old.type, old.shape = None, None
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=is_output)
        new.nodes[0].replace_input_with(0, old)
        self._graph.insert_after(node, new.nodes)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        value = initializer(ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value


def _constant(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_cache(value: ir.Value) -> bool:
    return str(value.name).startswith((names.PAST_PREFIX, names.PRESENT_PREFIX))
