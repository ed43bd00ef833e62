"""Lowering to the native CPU operators: whole W8A8 linears, and attention in logical order (`plugins/cpu`)."""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from engines import contract as names
from export import names as inner
from export.builder import GraphBuilder
from export.passes.prune import prune
from export.weight_file import WeightFile
from plugins.cpu.packing import pack_weight
from quasar.checkpoints import DecoderSpec

DOMAIN = "quasar.cpu"
# Type of the cache → operator.
_ATTENTION = {
    "float32": ("VerifyAttention", ir.DataType.FLOAT),
    "float16": ("VerifyAttentionFloat16", ir.DataType.FLOAT16),
    "bfloat16": ("VerifyAttentionBfloat16", ir.DataType.BFLOAT16),
}
_REPLACED = {"Attention", "TensorScatter", "RotaryEmbedding", "QuantizeLinear", "DequantizeLinear"}


class PackedWeights:
    """Packed weights of one engine: written once, however many graphs read them."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._packed: dict[str, ir.ExternalTensor] = {}

    def packed(self, name: str, weight: ir.Value, *, swiglu: bool) -> ir.Value:
        """The packed form of a canonical weight int8 [K, N] as an initializer."""
        assert weight.const_value is not None
        if name not in self._packed:
            self._packed[name] = self._file.append(name, pack_weight(weight.const_value.numpy().T, swiglu=swiglu))
        tensor = self._packed[name]
        shape = ir.Shape(tensor.shape)
        return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """What one W8A8 linear of the canonical graph consists of, with the neighbours that the operator takes in."""

    name: str
    x: ir.Value
    weight: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    residual: ir.Value | None
    norm: ir.Node | None
    swiglu: bool
    output: ir.Value


class LowerToNative(InPlacePass):
    """Canonical graph → quasar.cpu operators, where there is one; what is float stays as it is.

    A W8A8 linear becomes one node with its bias, the RMS norm before it where nothing else reads that, and the residual
    sum or SwiGLU behind it. Attention takes the packed q/k/v, the caches and the tree mask, which every native graph
    has: trees are exact there. `kv_dtype`: what the caches hold.
    """

    def __init__(self, spec: DecoderSpec, weights: PackedWeights, kv_dtype: str = "float32") -> None:
        super().__init__()
        self._spec = spec
        self._attention, self._cache_type = _ATTENTION[kv_dtype]
        self._weights = weights

    def requires(self, model: ir.Model) -> None:
        """A canonical graph: attention in standard operators."""
        if not any(node.op_type == "Attention" for node in model.graph):
            raise PreconditionError("the graph has no Attention node: it is no canonical verifier")

    def ensures(self, model: ir.Model) -> None:
        """Nothing is left of what was replaced."""
        left = sorted(_REPLACED.intersection(node.op_type for node in model.graph))
        if left:
            raise PostconditionError(f"nodes are left that were to be replaced: {', '.join(left)}")

    def call(self, model: ir.Model) -> PassResult:
        """Replace attention, linears and the arg max, and drop what only they used."""
        graph = model.graph
        layers = sum(node.op_type == "Attention" for node in graph)
        values = {str(value.name): value for node in graph for value in node.outputs}
        values.update({str(value.name): value for value in graph.inputs})
        values.update(graph.initializers)
        tree = values.get(names.TREE_MASK)
        if tree is None:
            shape = ir.Shape(["batch", "tokens", "tokens"])
            tree = ir.Value(name=names.TREE_MASK, type=ir.TensorType(ir.DataType.BOOL), shape=shape)
            graph.inputs.append(tree)
        for layer in range(layers):
            self._lower_attention(graph, layer, values, tree)
        for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
            self._lower_linear(graph, _match_linear(node))
        for node in [node for node in graph if node.op_type == "ArgMax"]:
            self._lower_argmax(graph, node)
        graph.sort()
        graph.opset_imports[DOMAIN] = 1
        prune(model)
        return PassResult(model, modified=True)

    def _lower_attention(self, graph: ir.Graph, layer: int, values: dict[str, ir.Value], tree: ir.Value) -> None:
        spec, prefix = self._spec, f"layers.{layer}.self_attn"
        norms = [values[f"{prefix}.{part}_norm.weight"] if spec.qk_norm else None for part in "qk"]
        old = values[inner.context(layer)]
        new = GraphBuilder()
        context, key, value = new.ops(
            self._attention,
            [
                values[inner.packed_qkv(layer)],
                *(values[name] for name in names.past_names(layer)),
                values[names.CACHE_LENGTHS],
                values[names.POSITION_IDS],
                values[inner.COS_TABLE],
                values[inner.SIN_TABLE],
                tree,
                *norms,
            ],
            inner.attention(layer),
            [inner.context(layer), *names.present_names(layer)],
            {
                "num_heads": spec.num_heads,
                "kv_num_heads": spec.num_kv_heads,
                "local_window_size": 0,
                "scale": float(spec.head_size**-0.5),
                "softcap": 0.0,
                "epsilon": spec.rms_norm_eps,
            },
            domain=DOMAIN,
        )
        ir.convenience.replace_all_uses_with(old, context)
        for name in names.past_names(layer):
            values[name].type = ir.TensorType(self._cache_type)
        for name, present in zip(names.present_names(layer), (key, value), strict=True):
            position = [output.name for output in graph.outputs].index(name)
            present.type, present.shape = ir.TensorType(self._cache_type), graph.outputs[position].shape
            graph.outputs[position] = present
        _insert_behind(graph, old, new)

    def _lower_linear(self, graph: ir.Graph, linear: _Linear) -> None:
        packed = self._weights.packed(f"{linear.name}.packed", linear.weight, swiglu=linear.swiglu)
        graph.register_initializer(packed)
        x, norm_weight, epsilon = linear.x, None, 0.0
        if linear.norm is not None:
            x, norm_weight = _input(linear.norm, 0), _input(linear.norm, 1)
            epsilon = linear.norm.attributes["epsilon"].as_float()
        assert linear.scale.const_value is not None
        columns = linear.scale.const_value.size
        new = GraphBuilder()
        y = new.op(
            "W8A8Linear",
            [x, packed, linear.scale, linear.bias, linear.residual, norm_weight],
            str(linear.output.name),
            {"outputs": columns // 2 if linear.swiglu else columns, "swiglu": int(linear.swiglu), "epsilon": epsilon},
            domain=DOMAIN,
        )
        y.type, y.shape = linear.output.type, linear.output.shape
        ir.convenience.replace_all_uses_with(linear.output, y, replace_graph_outputs=True)
        _insert_behind(graph, linear.output, new)

    @staticmethod
    def _lower_argmax(graph: ir.Graph, node: ir.Node) -> None:
        new = GraphBuilder()
        old = node.outputs[0]
        tokens = new.op("ArgMax", [_input(node, 0)], str(old.name), domain=DOMAIN)
        tokens.type, tokens.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, tokens, replace_graph_outputs=True)
        _insert_behind(graph, old, new)


def _match_linear(quantize: ir.Node) -> _Linear:
    """The linear whose activations a QuantizeLinear node makes."""
    name = str(quantize.name).removesuffix(".quantized")
    unit = _producer(_input(quantize, 0), "Div")
    x = _input(unit, 0)
    matmul = _consumer(_consumer(quantize.outputs[0], "DequantizeLinear").outputs[0], "MatMul")
    weight = _producer(_input(matmul, 1), "DequantizeLinear")
    output = _consumer(matmul.outputs[0], "Mul").outputs[0]
    bias = residual = None
    add = _only_user(output, "Add")
    if add is not None and (other := _other_input(add, output)).const_value is not None:
        bias, output = other, add.outputs[0]
        add = _only_user(output, "Add")
    split = _only_user(output, "Split")
    swiglu = split is not None and split.attributes.get("num_outputs") is not None
    if split is not None and swiglu:
        output = _consumer(split.outputs[1], "Mul").outputs[0]
    elif add is not None:
        residual, output = _other_input(add, output), add.outputs[0]
    norm = x.producer()
    if norm is None or norm.op_type != "RMSNormalization" or len(x.uses()) != 2:
        norm = None
    return _Linear(
        name=name,
        x=x,
        weight=_input(weight, 0),
        scale=_input(weight, 1),
        bias=bias,
        residual=residual,
        norm=norm,
        swiglu=swiglu,
        output=output,
    )


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    return _input(node, 1) if node.inputs[0] is value else _input(node, 0)


def _producer(value: ir.Value, kind: str) -> ir.Node:
    node = value.producer()
    if node is None or node.op_type != kind:
        raise PreconditionError(f"{value.name} is not made by {kind}: this is no canonical linear")
    return node


def _consumer(value: ir.Value, kind: str) -> ir.Node:
    node = _only_user(value, kind)
    if node is None:
        raise PreconditionError(f"{value.name} is not read by one {kind}: this is no canonical linear")
    return node


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The node that alone reads a value, if it is of that kind and the value is no output of the graph."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != kind or value.is_graph_output():
        return None
    return uses[0].node


def _insert_behind(graph: ir.Graph, value: ir.Value, new: GraphBuilder) -> None:
    node = value.producer()
    assert node is not None
    graph.insert_after(node, new.nodes)
