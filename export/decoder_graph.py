"""What the graphs of decoders have in common: norms, rotation, attention over a cache, MLPs, in standard operators."""

from typing import Any, Protocol, assert_never

import numpy as np
import onnx_ir as ir

from calibration.weights import PreparedLinear
from engines import contract as names
from export import names as inner
from export.builder import GraphBuilder
from export.linears import add_linear
from export.weight_file import WeightFile
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.rope import cos_sin_tables
from quasar.checkpoints.spec import AttentionSpec, Linear, MlpSpec, Rope
from quasar.numerics import Float32

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
BATCH, TOKENS, CAPACITY, ROWS = "batch", "tokens", "capacity", "rows"


class DecoderWeights(Protocol):
    """Tensors as a graph gets them."""

    def vector(self, name: str) -> Float32:
        """A norm's weight float32 [channels]."""

    def linear(self, linear: Linear) -> PreparedLinear:
        """A linear with its members' rows stacked."""


class DecoderGraph:
    """Writes the parts of a decoder. `spec`: its layers and norms."""

    def __init__(self, spec: DecoderSpec, prepared: DecoderWeights, weights: WeightFile, capacity: int) -> None:
        self.spec, self._prepared, self._weights, self._capacity = spec, prepared, weights, capacity
        self._graph = GraphBuilder()

    def _inputs(self, *, tree_mask: bool) -> tuple[ir.Value, ir.Value]:
        """The inputs of every decoder, with caches, tables and masks; returns `input_ids` and `logits_rows`."""
        graph, spec = self._graph, self.spec
        ids = graph.input(names.INPUT_IDS, INT64, [BATCH, TOKENS])
        self._positions = graph.input(names.POSITION_IDS, INT64, [BATCH, TOKENS])
        self._lengths = graph.input(names.CACHE_LENGTHS, INT64, [BATCH])
        tree = graph.input(names.TREE_MASK, ir.DataType.BOOL, [BATCH, TOKENS, TOKENS]) if tree_mask else None
        logits_rows = graph.input(names.LOGITS_ROWS, INT64, [ROWS])
        self._past = [
            tuple(graph.input(name, FLOAT, self._cache_shape) for name in names.past_names(layer))
            for layer in range(spec.num_layers)
        ]
        self._tables = {rope: self._rotary_tables(number, rope) for number, rope in enumerate(spec.ropes)}
        self._masks = self._causal_masks(ids) if tree is None else self._tree_masks(ids, tree)
        return ids, logits_rows

    @property
    def _cache_shape(self) -> list[int | str]:
        return [BATCH, self.spec.num_kv_heads, CAPACITY, self.spec.head_size]

    def _lookup(self, table: ir.Value, ids: ir.Value) -> ir.Value:
        """The embedding's rows of tokens, in float32: [B, T] → [B, T, hidden]."""
        graph = self._graph
        if table.dtype == FLOAT:
            embedded = graph.op("Gather", [table, ids], "embedded")
        else:
            stored = graph.op("Gather", [table, ids], "embedded.stored")
            embedded = graph.op("Cast", [stored], "embedded", {"to": int(FLOAT)})
        if self.spec.embedding_scale == 1:
            return embedded
        scale = graph.constant("embedding_scale", np.asarray(self.spec.embedding_scale, np.float32))
        return graph.op("Mul", [embedded, scale], "embedded.scaled")

    def _rotary_tables(self, number: int, rope: Rope) -> tuple[ir.Value, ir.Value]:
        names = inner.cos_table(number), inner.sin_table(number)
        tables = cos_sin_tables(rope, self.spec.head_size, self._capacity)
        cos, sin = (
            self._graph.weight(self._weights.append(name, table)) for name, table in zip(names, tables, strict=True)
        )
        return cos, sin

    def _causal_masks(self, ids: ir.Value) -> dict[int | None, ir.Value]:
        """Bool [B, 1, T, S] by window: the position fed as number r sees the slots up to cache_lengths + r."""
        graph = self._graph
        shape = graph.op("Shape", [ids], inner.NUM_ROWS, {"start": 1, "end": 2})
        count = graph.op("Squeeze", [shape], "num_rows.scalar")
        new = graph.op("Range", [graph.constant("zero", 0), count, graph.constant("one", 1)], "mask.new_rows")
        lengths = graph.op("Unsqueeze", [self._lengths, graph.constant("axes.1_2_3", [1, 2, 3])], "mask.lengths")
        column = graph.op("Unsqueeze", [new, graph.constant("axes.1", [1])], "mask.column")
        last = graph.op("Add", [lengths, column], "mask.last_slot")
        slots = self._slots()
        mask = graph.op("LessOrEqual", [slots, last], inner.MASK)
        # In a chain a slot's number is its position.
        return {None: mask, **self._window_masks(mask, slots)}

    def _tree_masks(self, ids: ir.Value, tree: ir.Value) -> dict[int | None, ir.Value]:
        """Bool [B, 1, T, S] by window: a position sees committed slots, and of the new ones those of `tree_mask`."""
        graph = self._graph
        count = graph.op("Shape", [ids], inner.NUM_ROWS, {"start": 1, "end": 2})
        zeros = graph.constant("mask.first", [0])
        lengths = graph.op("Unsqueeze", [self._lengths, graph.constant("axes.1_2", [1, 2])], "mask.lengths")
        slots = self._slots()
        # int64 [B, 1, S]: which new position lies in a slot; negative where a committed one does.
        new = graph.op("Sub", [slots, lengths], "mask.new_row")
        committed = graph.op("Less", [new, zeros], "mask.committed")
        fed = graph.op("Less", [new, count], "mask.fed")
        last = graph.op("Sub", [count, graph.constant("mask.one", [1])], "mask.last_row")
        column = graph.op("Min", [graph.op("Max", [new, zeros], "mask.from_first"), last], "mask.column")
        batch = graph.op("Shape", [ids], "mask.batch", {"start": 0, "end": 1})
        num_slots = graph.op("Shape", [self._past[0][0]], "mask.num_slots", {"start": 2, "end": 3})
        shape = graph.op("Concat", [batch, count, num_slots], "mask.shape", {"axis": 0})
        columns = graph.op("Expand", [column, shape], "mask.columns")
        seen = graph.op("GatherElements", [tree, columns], "mask.seen", {"axis": 2})
        visible = graph.op("Or", [committed, graph.op("And", [seen, fed], "mask.seen_and_fed")], "mask.rows")
        axis = graph.constant("axes.1", [1])
        mask = graph.op("Unsqueeze", [visible, axis], inner.MASK)
        if not self.spec.windows:
            return {None: mask}
        # A committed slot's number is its position; a new one has the position that is fed with it.
        rows = graph.op("Unsqueeze", [self._positions, axis], "mask.row_positions")
        fed_positions = graph.op("GatherElements", [rows, column], "mask.fed_positions", {"axis": 2})
        positions = graph.op("Where", [committed, slots, fed_positions], "mask.slot_positions")
        return {None: mask, **self._window_masks(mask, graph.op("Unsqueeze", [positions, axis], "mask.positions"))}

    def _window_masks(self, mask: ir.Value, slot_positions: ir.Value) -> dict[int | None, ir.Value]:
        """By window, what a position sees: of `mask`, the positions nearer than the window.

        `slot_positions`: int64, broadcast to [B, 1, T, S].
        """
        graph = self._graph
        masks: dict[int | None, ir.Value] = {}
        for window in self.spec.windows:
            name = inner.window_mask(window)
            axes = graph.constant("axes.1_3", [1, 3])
            before = graph.op("Sub", [self._positions, graph.constant(f"{name}.size", [window])], f"{name}.before")
            hidden = graph.op("Unsqueeze", [before, axes], f"{name}.last_hidden")
            near = graph.op("Greater", [slot_positions, hidden], f"{name}.near")
            masks[window] = graph.op("And", [mask, near], name)
        return masks

    def _slots(self) -> ir.Value:
        """The numbers of the cache slots: int64 [S]."""
        graph = self._graph
        shape = graph.op("Shape", [self._past[0][0]], "mask.capacity", {"start": 2, "end": 3})
        count = graph.op("Squeeze", [shape], "mask.capacity.scalar")
        return graph.op("Range", [graph.constant("zero", 0), count, graph.constant("one", 1)], "mask.slots")

    def _attention(
        self, number: int, attention: AttentionSpec, h: ir.Value, qkv: Linear, output: Linear
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Projections around attention over the cache: [B, T, inputs] → [B, T, hidden], and the layer's caches."""
        graph, prefix = self._graph, f"layers.{number}.self_attn"
        packed = self._linear(qkv, h, inner.packed_qkv(number))
        # Constants are shared by all layers: their heads are the same (`DecoderSpec.check`).
        sizes = graph.constant("qkv_sizes", [attention.query_size, attention.kv_size, attention.kv_size])
        parts = [f"{prefix}.{part}" for part in "qkv"]
        q, k, v = graph.ops("Split", [packed, sizes], f"{prefix}.split", parts, {"axis": -1})
        if attention.qk_norm == "row":
            q, k = self._norm(f"{prefix}.q_norm", q), self._norm(f"{prefix}.k_norm", k)
        norm = attention.qk_norm == "head"
        q = self._rotate(f"{prefix}.q", self._heads(f"{prefix}.q", q, norm=norm), attention.rope)
        k = self._rotate(f"{prefix}.k", self._heads(f"{prefix}.k", k, norm=norm), attention.rope)
        v = self._heads(f"{prefix}.v", v, norm=False)
        presents = [
            graph.op("TensorScatter", [past, new, self._lengths], name, {"axis": 2, "mode": "linear"})
            for past, new, name in zip(self._past[number], (k, v), names.present_names(number), strict=True)
        ]
        attributes: dict[str, Any] = {"is_causal": 0}
        if attention.softmax_scale is not None:
            attributes["scale"] = attention.softmax_scale
        if attention.softcap:
            attributes["softcap"] = attention.softcap
        mask = self._masks[attention.window]
        heads = graph.op("Attention", [q, *presents, mask], inner.attention(number), attributes)
        positions_first = graph.op("Transpose", [heads], f"{prefix}.rows_first", {"perm": [0, 2, 1, 3]})
        merged = graph.constant("merge_heads", [0, 0, attention.query_size])
        context = graph.op("Reshape", [positions_first, merged], inner.context(number))
        return self._linear(output, context, f"{prefix}.output"), presents

    def _heads(self, name: str, x: ir.Value, *, norm: bool) -> ir.Value:
        """[B, T, heads·D] → [B, heads, T, D], each head's vector normalized where the architecture does so."""
        shape = self._graph.constant("split_heads", [0, 0, -1, self.spec.head_size])
        x = self._graph.op("Reshape", [x, shape], f"{name}.heads")
        if norm:
            x = self._norm(f"{name}_norm", x)
        return self._graph.op("Transpose", [x], f"{name}.heads_first", {"perm": [0, 2, 1, 3]})

    def _rotate(self, name: str, x: ir.Value, rope: Rope | None) -> ir.Value:
        if rope is None:
            return x
        attributes: dict[str, Any] = {"interleaved": 0}
        if rope.rotary_size:
            attributes["rotary_embedding_dim"] = rope.rotary_size
        inputs = [x, *self._tables[rope], self._positions]
        return self._graph.op("RotaryEmbedding", inputs, f"{name}.rotated", attributes)

    def _mlp(self, number: int, mlp: MlpSpec, h: ir.Value) -> ir.Value:
        """[B, T, hidden] → the same."""
        _, _, gate_up, down = self.spec.layer_linears(number)
        prefix = f"layers.{number}.mlp"
        gate, up = self._gate_and_up(prefix, self._linear(gate_up, h, f"{prefix}.gate_up"))
        match mlp.kind:
            case "gated_silu":
                sigmoid = self._graph.op("Sigmoid", [gate], f"{prefix}.sigmoid")
                gate = self._graph.op("Mul", [gate, sigmoid], f"{prefix}.silu")
                h = self._graph.op("Mul", [gate, up], f"{prefix}.swiglu")
            case "gated_gelu_tanh":
                gate = self._graph.op("Gelu", [gate], f"{prefix}.gelu", {"approximate": "tanh"})
                h = self._graph.op("Mul", [gate, up], f"{prefix}.geglu")
            case _:
                assert_never(mlp.kind)
        return self._linear(down, h, f"{prefix}.output")

    def _gate_and_up(self, name: str, gate_up: ir.Value) -> list[ir.Value]:
        return self._graph.ops(
            "Split", [gate_up], f"{name}.split", [f"{name}.gate", f"{name}.up"], {"axis": -1, "num_outputs": 2}
        )

    def _norm(self, name: str, x: ir.Value) -> ir.Value:
        weight = self._graph.weight(self._weights.append(f"{name}.weight", self._prepared.vector(f"{name}.weight")))
        attributes: dict[str, Any] = {"axis": -1, "epsilon": self.spec.rms_norm_eps}
        return self._graph.op("RMSNormalization", [x, weight], f"{name}.normed", attributes)

    def _linear(self, linear: Linear, x: ir.Value, output: str) -> ir.Value:
        return add_linear(self._graph, self._weights, linear.name, x, self._prepared.linear(linear), output)
