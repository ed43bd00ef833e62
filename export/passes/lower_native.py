"""Lowering to the native CPU operators: whole W8A8 linears, and attention in logical order (`plugins/cpu`)."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from engines import contract as names
from export import names as inner
from export.builder import GraphBuilder, initializer
from export.passes.linears_to_native import LinearsToNative
from export.passes.stored_weights import StoredWeights
from export.passes.walk import insert_after, prune
from plugins.cpu.library import DOMAIN
from quasar.checkpoints import DecoderSpec

# Type of the cache → operator.
_ATTENTION = {
    "float32": ("VerifyAttention", ir.DataType.FLOAT),
    "float16": ("VerifyAttentionFloat16", ir.DataType.FLOAT16),
    "bfloat16": ("VerifyAttentionBfloat16", ir.DataType.BFLOAT16),
}
_REPLACED = {"Attention", "TensorScatter", "RotaryEmbedding"}
# What the positions of several sequences in one row come with: name → type, shape.
_RAGGED = {
    names.SEQUENCE_STARTS: (ir.DataType.INT64, ["starts"]),
    names.CACHE_SLOTS: (ir.DataType.INT64, ["batch"]),
    names.TREE_MASK: (ir.DataType.BOOL, ["tree_values"]),
}


class LowerToNative(InPlacePass):
    """Canonical graph → quasar.cpu operators, where there is one; what is float stays as it is.

    Linears are those of `LinearsToNative`. Attention takes the packed q/k/v, the caches, and what says which positions
    are whose (`engines.contract`, the ragged form); every native graph has a tree mask: trees are exact there.
    `kv_dtype`: the float type that the caches hold; `CachesToInt8` makes integers of it afterwards.
    """

    def __init__(self, spec: DecoderSpec, weights: StoredWeights, kv_dtype: str = "float32") -> None:
        super().__init__()
        self._spec = spec
        self._attention, self._cache_type = _ATTENTION[kv_dtype]
        self._linears = LinearsToNative(weights)

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
        """Replace attention and linears, and drop what only they used."""
        graph = model.graph
        layers = sum(node.op_type == "Attention" for node in graph)
        values = {str(value.name): value for node in graph for value in node.outputs}
        values.update({str(value.name): value for value in graph.inputs})
        values.update(graph.initializers)
        for name, (kind, shape) in _RAGGED.items():
            if name not in values:
                values[name] = ir.Value(name=name)
                graph.inputs.append(values[name])
            values[name].type, values[name].shape = ir.TensorType(kind), ir.Shape(shape)
        for value in (*graph.inputs, *graph.outputs):
            value.shape = _ragged_shape(value)
        if any(layer.attention.rope is None for layer in self._spec.layers[:layers]):
            # What layers that do not rotate have for both tables: no value of a row is rotated.
            nothing = initializer(ir.tensor(np.empty((1, 0), np.float32), name=inner.NO_ROTATION))
            graph.register_initializer(nothing)
            values[inner.NO_ROTATION] = nothing
        for layer in range(layers):
            self._lower_attention(graph, layer, values)
        self._linears(model)
        graph.sort()
        graph.opset_imports[DOMAIN] = 1
        prune(model)
        return PassResult(model, modified=True)

    def _lower_attention(self, graph: ir.Graph, layer: int, values: dict[str, ir.Value]) -> None:
        spec, prefix = self._spec.layers[layer].attention, f"layers.{layer}.self_attn"
        tables = [inner.NO_ROTATION] * 2
        if spec.rope is not None:
            number = self._spec.ropes.index(spec.rope)
            tables = [inner.cos_table(number), inner.sin_table(number)]
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
                *(values[table] for table in tables),
                values[names.TREE_MASK],
                *norms,
                values[names.SEQUENCE_STARTS],
                values[names.CACHE_SLOTS],
            ],
            inner.attention(layer),
            [inner.context(layer), *names.present_names(layer)],
            {
                "num_heads": spec.num_heads,
                "kv_num_heads": spec.num_kv_heads,
                "local_window_size": spec.window or 0,
                "scale": spec.scale,
                "softcap": spec.softcap,
                "epsilon": self._spec.rms_norm_eps,
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
        insert_after(graph, old, new)


def _ragged_shape(value: ir.Value) -> ir.Shape | None:
    """A shape of the canonical form → of the ragged one: one row for all sequences, and caches of all slots."""
    if value.shape is None or len(value.shape) < 2:
        return value.shape
    is_cache = str(value.name).startswith((names.PAST_PREFIX, names.PRESENT_PREFIX))
    return ir.Shape(["slots" if is_cache else 1, *value.shape[1:]])
