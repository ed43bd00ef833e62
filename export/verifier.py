"""The canonical verifier graph, built from the spec tensor by tensor: standard ONNX operators of opset 24 only.

One graph serves prefill and verification; `engines.contract` says what its inputs and outputs mean.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from calibration.weights import PreparedWeights
from engines import contract as names
from export import names as inner
from export.decoder_graph import BATCH, FLOAT, INT64, ROWS, DecoderGraph
from export.weight_file import WeightFile
from quasar.checkpoints.spec import LayerSpec, Linear


def build_verifier(
    prepared: PreparedWeights,
    weights: WeightFile,
    *,
    capacity: int,
    top_k: int,
    producer_version: str,
    tree_mask: bool = False,
    on_linear: Callable[[], None] = lambda: None,
) -> ir.Model:
    """The canonical graph of a decoder; its large tensors are appended to `weights` as they are reached.

    Args:
        capacity: positions of the KV cache, and so rows of the rotary tables.
        top_k: tokens that `top_tokens` names after each position of the output.
        tree_mask: give the graph the input of that name, so that new positions can form a tree.
        on_linear: called after each linear, for progress.
    """
    graph = _VerifierGraph(prepared, weights, capacity, on_linear)
    return graph.build(producer_version, top_k=top_k, tree_mask=tree_mask)


class _VerifierGraph(DecoderGraph):
    def __init__(
        self, prepared: PreparedWeights, weights: WeightFile, capacity: int, on_linear: Callable[[], None]
    ) -> None:
        super().__init__(prepared.spec, prepared, weights, capacity)
        self._whole, self._on_linear = prepared, on_linear

    def build(self, producer_version: str, *, top_k: int, tree_mask: bool) -> ir.Model:
        graph, spec = self._graph, self.spec
        ids, logits_rows = self._inputs(tree_mask=tree_mask)
        x = self._embed(ids)
        presents: list[ir.Value] = []
        for number, layer in enumerate(spec.layers):
            x, present = self._layer(number, layer, x)
            presents += present
        logits = self._logits(x, logits_rows)
        tokens, top = self._top_tokens(logits, top_k)

        graph.output(tokens, INT64, [BATCH, ROWS])
        graph.output(top, INT64, [BATCH, ROWS, top_k])
        graph.output(logits, FLOAT, [BATCH, ROWS, spec.vocab_size])
        for value in presents:
            graph.output(value, FLOAT, self._cache_shape)
        return graph.model("verifier", producer_version)

    def _embed(self, ids: ir.Value) -> ir.Value:
        table = self._weights.append("embed_tokens.weight", self._whole.embedding())
        self._embedding = self._graph.weight(table)
        return self._lookup(self._embedding, ids)

    def _layer(self, number: int, layer: LayerSpec, x: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """The residual stream [B, T, hidden] → the same after a layer, and the layer's caches."""
        prefix = f"layers.{number}"
        qkv, output, _, _ = self.spec.layer_linears(number)
        h = self._norm(f"{prefix}.input_layernorm", x) if layer.input_norms else x
        attended, presents = self._attention(number, layer.attention, h, qkv, output)
        if layer.output_norms:
            attended = self._norm(f"{prefix}.attention_output_layernorm", attended)
        x = self._graph.op("Add", [x, attended], f"{prefix}.attended")
        h = self._norm(f"{prefix}.post_attention_layernorm", x) if layer.input_norms else x
        h = self._mlp(number, layer.mlp, h)
        if layer.output_norms:
            h = self._norm(f"{prefix}.mlp_output_layernorm", h)
        return self._graph.op("Add", [x, h], names.layer_output(number)), presents

    def _logits(self, x: ir.Value, logits_rows: ir.Value) -> ir.Value:
        cap = self.spec.logits_softcap
        if not cap:
            return self._head(x, logits_rows, names.LOGITS)
        graph = self._graph
        head, value = self._head(x, logits_rows, "logits.head"), np.asarray(cap, np.float32)
        divided = graph.op("Div", [head, graph.constant("logits.cap", value)], "logits.divided")
        bounded = graph.op("Tanh", [divided], "logits.bounded")
        return graph.op("Mul", [bounded, graph.constant("logits.cap", value)], names.LOGITS)

    def _head(self, x: ir.Value, logits_rows: ir.Value, output: str) -> ir.Value:
        selected = self._graph.op("Gather", [x, logits_rows], inner.HEAD_ROWS, {"axis": 1})
        h = self._norm("norm", selected)
        if self.spec.tied_head and not self._whole.is_quantized(self.spec.head.name):
            return self._tied_head(h, output)
        return self._linear(self.spec.head, h, output)

    def _top_tokens(self, logits: ir.Value, top_k: int) -> tuple[ir.Value, ir.Value]:
        """`next_tokens` and `top_tokens`: the likeliest one is the first of the likeliest, so one pass finds both."""
        graph = self._graph
        count, outputs = graph.constant("top_k", [top_k]), ["top_logits", names.TOP_TOKENS]
        attributes = {"axis": -1, "largest": 1, "sorted": 1}
        _, top = graph.ops("TopK", [logits, count], names.TOP_TOKENS, outputs, attributes)
        return graph.op("Gather", [top, graph.constant("zero", 0)], names.NEXT_TOKENS, {"axis": -1}), top

    def _tied_head(self, h: ir.Value, output: str) -> ir.Value:
        """The float head of a tied model reads the embedding's own tensor; back ends fold the transposition."""
        graph = self._graph
        columns = graph.op("Transpose", [self._embedding], "lm_head.columns", {"perm": [1, 0]})
        if self._embedding.dtype != FLOAT:
            columns = graph.op("Cast", [columns], "lm_head.columns.float", {"to": int(FLOAT)})
        self._on_linear()
        return graph.op("MatMul", [h, columns], output)

    def _linear(self, linear: Linear, x: ir.Value, output: str) -> ir.Value:
        y = super()._linear(linear, x, output)
        self._on_linear()
        return y
