"""Lowering to ONNX Runtime: attention becomes GroupQueryAttention over packed q/k/v and a shared KV buffer."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from engines import contract as names
from export import names as inner
from export.builder import MICROSOFT, GraphBuilder
from export.passes.walk import prune
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import QkNorm

_Values = dict[str | None, ir.Value]
# Operators of the canonical attention that must be gone afterwards.
_REPLACED = {"Attention", "TensorScatter", "RotaryEmbedding"}


class LowerToOnnxRuntime(InPlacePass):
    """Canonical graph → com.microsoft.GroupQueryAttention.

    Attention gets spare positions of zeros after the new ones (`engines.contract.spare_positions`), which are sliced
    off again: with them the bits of a position do not depend on how many are fed with it. Their K/V land after the new
    positions in the cache, and the next pass overwrites them. A tree mask becomes the operator's additive bias.
    Everything else in the graph stays as it is.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self._spec = spec

    def requires(self, model: ir.Model) -> None:
        """Every layer has its Attention node under the canonical name."""
        found = {node.name for node in model.graph if node.op_type == "Attention"}
        expected = {inner.attention(layer) for layer in range(self._spec.num_layers)}
        if found != expected:
            raise PreconditionError(f"Attention nodes {sorted(map(str, found ^ expected))} are missing or unknown")

    def ensures(self, model: ir.Model) -> None:
        """One GroupQueryAttention per layer; nothing of the canonical attention is left."""
        kinds = [node.op_type for node in model.graph]
        if kinds.count("GroupQueryAttention") != self._spec.num_layers or _REPLACED.intersection(kinds):
            raise PostconditionError("attention was not lowered in every layer")

    def call(self, model: ir.Model) -> PassResult:
        """Replace each layer's attention and drop what only it used."""
        graph = model.graph
        values: _Values = {value.name: value for node in graph for value in node.outputs}
        values.update({value.name: value for value in graph.inputs})
        values.update(graph.initializers.items())
        spare = _SparePositions(self._spec, values)
        for layer in range(self._spec.num_layers):
            self._lower_layer(graph, layer, values, spare)
        for value in spare.builder.initializers:
            graph.register_initializer(value)
        first = next(iter(graph))
        graph.insert_before(first, spare.builder.nodes)
        graph.sort()
        graph.opset_imports[MICROSOFT] = 1
        prune(model)
        return PassResult(model, modified=True)

    def _lower_layer(self, graph: ir.Graph, layer: int, values: _Values, spare: "_SparePositions") -> None:
        spec, prefix = self._spec.layers[layer].attention, f"layers.{layer}.self_attn"
        new = GraphBuilder()
        packed = (
            self._packed_with_norms(new, prefix, spec.qk_norm, values, spare)
            if spec.qk_norm
            else values[inner.packed_qkv(layer)]
        )
        padded = new.op("Concat", [packed, spare.zeros], f"{prefix}.padded", {"axis": 1})
        # With a tree mask, the bias holds the window: the operator's own counts slots, not positions.
        bias = spare.bias(spec.window)
        attributes: dict[str, Any] = {
            "num_heads": spec.num_heads,
            "kv_num_heads": spec.num_kv_heads,
            "do_rotary": int(spec.rope is not None),
            "rotary_interleaved": 0,
        }
        if spec.window is not None and bias is None:
            attributes["local_window_size"] = spec.window
        if spec.softmax_scale is not None:
            attributes["scale"] = spec.softmax_scale
        if spec.softcap:
            attributes["softcap"] = spec.softcap
        rotation: list[ir.Value | None] = [None, None, None]
        if spec.rope is not None:
            # Tables narrower than half a head rotate its first values alone.
            number = self._spec.ropes.index(spec.rope)
            rotation = [values[inner.cos_table(number)], values[inner.sin_table(number)], spare.positions]
        past = [values[name] for name in names.past_names(layer)]
        attended, key, value = new.ops(
            "GroupQueryAttention",
            [
                *(padded, None, None, *past, spare.last_row, spare.total),
                *(*rotation, bias),
            ],
            inner.attention(layer),
            [f"{prefix}.padded_context", *names.present_names(layer)],
            attributes,
            domain=MICROSOFT,
        )
        old = values[inner.context(layer)]
        context = new.op("Slice", [attended, spare.zero, spare.num_rows, spare.axis_1], inner.context(layer))
        ir.convenience.replace_all_uses_with(old, context)
        for name, present in zip(names.present_names(layer), (key, value), strict=True):
            position = [output.name for output in graph.outputs].index(name)
            present.type, present.shape = graph.outputs[position].type, graph.outputs[position].shape
            graph.outputs[position] = present
        old_node = old.producer()
        assert old_node is not None
        graph.insert_after(old_node, new.nodes)

    @staticmethod
    def _packed_with_norms(
        new: GraphBuilder, prefix: str, norm: QkNorm, values: _Values, spare: "_SparePositions"
    ) -> ir.Value:
        """Queries and keys after their norms, packed again: on the CPU the operator itself has no norms."""
        merged = [values[f"{prefix}.{part}_norm.normed"] for part in "qk"]
        if norm == "head":
            merged = [
                new.op("Reshape", [normed, spare.merge_heads], f"{prefix}.{part}.merged")
                for part, normed in zip("qk", merged, strict=True)
            ]
        return new.op("Concat", [*merged, values[f"{prefix}.v"]], f"{prefix}.normed_qkv", {"axis": -1})


class _SparePositions:
    """What every layer's attention shares: zeros, padded position ids, and the counts that the operator wants."""

    def __init__(self, spec: DecoderSpec, values: _Values) -> None:
        self.builder = builder = GraphBuilder()
        lengths = values[names.CACHE_LENGTHS]
        self.num_rows = builder.op("Shape", [values[names.INPUT_IDS]], "spare.num_rows", {"start": 1, "end": 2})
        self.zero = builder.constant("spare.zero", [0])
        self.axis_1 = builder.constant("spare.axis_1", [1])
        self.merge_heads = builder.constant("spare.merge_heads", [0, 0, -1])
        longest = builder.op("ReduceMax", [lengths], "spare.longest", {"keepdims": 0})
        used = builder.op("Add", [longest, self.num_rows], "spare.used")
        spare = self._count(spec, used)
        batch = builder.op("Shape", [lengths], "spare.batch", {"start": 0, "end": 1})
        attention = spec.layers[0].attention
        packed = builder.constant("spare.packed_size", [attention.query_size + 2 * attention.kv_size])
        shape = builder.op("Concat", [batch, spare, packed], "spare.shape", {"axis": 0})
        # float zeros [B, spare positions, (H + 2G)·D], made once per pass.
        self.zeros = builder.op("ConstantOfShape", [shape], "spare.zeros")
        pads = builder.op("Concat", [builder.constant("spare.zeros_3", [0] * 3), spare], "spare.pads", {"axis": 0})
        self.positions = builder.op("Pad", [values[names.POSITION_IDS], pads], "spare.positions")
        fed = builder.op("Add", [self.num_rows, spare], "spare.fed")
        last = builder.op(
            "Add", [lengths, builder.op("Sub", [fed, self.axis_1], "spare.fed_less_one")], "spare.last_row_64"
        )
        total_64 = builder.op("Add", [used, spare], "spare.total_64")
        total = builder.op("Squeeze", [total_64], "spare.total_scalar")
        self.last_row = builder.op("Cast", [last], "spare.last_row", {"to": int(ir.DataType.INT32)})
        self.total = builder.op("Cast", [total], "spare.total", {"to": int(ir.DataType.INT32)})
        self._biases: dict[int | None, ir.Value] = {}
        if names.TREE_MASK in values:
            for window in dict.fromkeys(layer.attention.window for layer in spec.layers):
                mask = inner.MASK if window is None else inner.window_mask(window)
                self._biases[window] = self._tree_bias(values[mask], mask.replace(inner.MASK, "spare"), spare, total_64)

    def bias(self, window: int | None) -> ir.Value | None:
        """What layers with that window add to their scores; None without a tree mask."""
        return self._biases.get(window)

    def _tree_bias(self, mask: ir.Value, name: str, spare: ir.Value, total: ir.Value) -> ir.Value:
        """Float [B, 1, T + spare, total]: 0 where a position sees a slot; the operator itself hides later slots."""
        builder = self.builder
        hidden = builder.constant("spare.hidden", np.asarray(np.finfo(np.float32).min / 2, np.float32))
        seen = builder.constant("spare.seen", np.asarray(0, np.float32))
        bias = builder.op("Where", [mask, seen, hidden], f"{name}.bias_of_slots")
        used = builder.op("Slice", [bias, self.zero, total, builder.constant("spare.axis_3", [3])], f"{name}.bias_used")
        before = builder.constant("spare.zeros_6", [0] * 6)
        pads = builder.op("Concat", [before, spare, self.zero], f"{name}.bias_pads", {"axis": 0})
        return builder.op("Pad", [used, pads], f"{name}.bias")

    def _count(self, spec: DecoderSpec, used: ir.Value) -> ir.Value:
        """`engines.contract.spare_positions` as a graph."""
        one = self.axis_1
        if names.spare_positions(spec.head_size, 0) == 1:
            return one
        wanted = self.builder.constant("spare.wide_head_rows", [names.spare_positions(spec.head_size, 0)])
        return self.builder.op("Max", [one, self.builder.op("Sub", [wanted, used], "spare.short_of")], "spare.count")
