"""The canonical graphs of a draft head: its layer over a cache of its own, and what makes one vector of hidden states.

`engines.draft_head` says what their inputs and outputs mean. Standard ONNX operators of opset 24 only.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines import contract as names
from engines import draft_head as head_names
from export.decoder_graph import BATCH, FLOAT, INT64, ROWS, TOKENS, DecoderGraph, DecoderWeights
from export.weight_file import WeightFile
from quasar.draft_heads.spec import DraftHeadSpec

_LAYER = "layers.0"


def build_head(
    spec: DraftHeadSpec,
    prepared: DecoderWeights,
    weights: WeightFile,
    embedding: ir.TensorProtocol,
    targets: NDArray[np.int64],
    *,
    capacity: int,
    top_k: int,
    producer_version: str,
) -> ir.Model:
    """The graph that is run for every position; its large tensors are appended to `weights`.

    Args:
        embedding: the table [vocabulary, hidden], of the head's own or the verifier's.
        targets: int64 [draft vocabulary], the verifier's token of each token that the head drafts.
        capacity: positions of the head's KV cache.
        top_k: likeliest tokens that it names after a position.
    """
    graph = _HeadGraph(spec, prepared, weights, capacity)
    return graph.build(embedding, targets, top_k=top_k, producer_version=producer_version)


def build_fuse(spec: DraftHeadSpec, prepared: DecoderWeights, weights: WeightFile, producer_version: str) -> ir.Model:
    """The graph that makes the hidden state which the head reads of those that the target has at a position."""
    graph = _HeadGraph(spec, prepared, weights, 1)
    return graph.build_fuse(producer_version)


class _HeadGraph(DecoderGraph):
    def __init__(self, spec: DraftHeadSpec, prepared: DecoderWeights, weights: WeightFile, capacity: int) -> None:
        super().__init__(spec.decoder, prepared, weights, capacity)
        self._head_spec = spec

    def build(
        self, embedding: ir.TensorProtocol, targets: NDArray[np.int64], *, top_k: int, producer_version: str
    ) -> ir.Model:
        graph, spec = self._graph, self._head_spec
        ids, logits_rows = self._inputs(tree_mask=True)
        hidden_size = spec.decoder.hidden_size
        hidden = graph.input(head_names.HIDDEN_STATES, FLOAT, [BATCH, TOKENS, hidden_size])
        embedded = self._lookup(graph.weight(embedding), ids)
        x, presents = self._eagle3(embedded, hidden) if spec.kind == "eagle3" else self._eagle(embedded, hidden)
        rows = graph.op("Gather", [x, logits_rows], head_names.OUTPUT_ROWS, {"axis": 1})
        normed = self._norm("norm", rows) if spec.kind == "eagle3" else rows
        logits = self._linear(spec.head, normed, "logits")
        top, likelihoods = self._top(logits, targets, top_k)
        # An output is a value of its own: what it is made of may be taken into another operator.
        following = graph.op("Identity", [normed if spec.norm_output else rows], head_names.NEXT_HIDDEN_STATES)

        graph.output(top, INT64, [BATCH, ROWS, top_k])
        graph.output(likelihoods, FLOAT, [BATCH, ROWS, top_k])
        graph.output(following, FLOAT, [BATCH, ROWS, hidden_size])
        for value in presents:
            graph.output(value, FLOAT, self._cache_shape)
        return graph.model("draft_head", producer_version)

    def build_fuse(self, producer_version: str) -> ir.Model:
        graph, spec = self._graph, self._head_spec
        size = spec.target_hidden_size
        states: list[ir.Value] = [
            graph.input(head_names.feature_name(number), FLOAT, [BATCH, TOKENS, size])
            for number in range(len(spec.feature_layers))
        ]
        norms = list(spec.feature_norms)
        if spec.feature_norm == "each":
            states = [
                self._norm(name.removesuffix(".weight"), state) for name, state in zip(norms, states, strict=True)
            ]
        x = graph.op("Concat", states, "features", {"axis": -1}) if len(states) > 1 else states[0]
        if spec.feature_norm == "all":
            x = self._norm(norms[0].removesuffix(".weight"), x)
        if spec.normed:
            x = self._norm(head_names.TARGET_NORM, x)
        if spec.kind == "eagle3":
            x = self._linear(spec.fuse, x, "fc.output")
        graph.output(graph.op("Identity", [x], head_names.FUSED), FLOAT, [BATCH, TOKENS, spec.decoder.hidden_size])
        return graph.model("draft_head_fuse", producer_version)

    def _eagle3(self, embedded: ir.Value, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """Attention reads the norm of the embedding beside that of the hidden state, which is the residual stream."""
        graph = self._graph
        first, second = self._norm(f"{_LAYER}.input_layernorm", embedded), self._norm(f"{_LAYER}.hidden_norm", hidden)
        both = graph.op("Concat", [first, second], f"{_LAYER}.read", {"axis": -1})
        return self._layer(both, second if self._head_spec.norm_before_residual else hidden)

    def _eagle(self, embedded: ir.Value, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """One linear makes the residual stream of both, and attention reads it without a norm."""
        both = self._graph.op("Concat", [embedded, hidden], f"{_LAYER}.read", {"axis": -1})
        x = self._linear(self._head_spec.fuse, both, "fc.output")
        return self._layer(x, x)

    def _layer(self, read: ir.Value, x: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """Attention over what it reads, added to the residual stream x, then the MLP."""
        layer = self.spec.layers[0]
        qkv, output, _, _ = self._head_spec.layer_linears()
        attended, presents = self._attention(0, layer.attention, read, qkv, output)
        x = self._graph.op("Add", [x, attended], f"{_LAYER}.attended")
        h = self._mlp(0, layer.mlp, self._norm(f"{_LAYER}.post_attention_layernorm", x))
        return self._graph.op("Add", [x, h], names.layer_output(0)), presents

    def _top(self, logits: ir.Value, targets: NDArray[np.int64], top_k: int) -> tuple[ir.Value, ir.Value]:
        """The likeliest tokens, as the verifier's ids, and their log-probabilities among those that it drafts."""
        graph = self._graph
        outputs, attributes = ["top_logits", "top_places"], {"axis": -1, "largest": 1, "sorted": 1}
        _, places = graph.ops("TopK", [logits, graph.constant("top_k", [top_k])], "top", outputs, attributes)
        # ONNX Runtime's softmax is vectorized, and its ReduceLogSumExp is not: it took a sixth of a step.
        shares = graph.op("Softmax", [logits], "shares", {"axis": -1})
        likeliest = graph.op("GatherElements", [shares, places], "likeliest_shares", {"axis": -1})
        likelihoods = graph.op("Log", [likeliest], head_names.LOG_PROBABILITIES)
        if not self._head_spec.reduces_vocabulary:
            return graph.op("Identity", [places], names.TOP_TOKENS), likelihoods
        table = graph.weight(self._weights.append("targets", targets))
        return graph.op("Gather", [table, places], names.TOP_TOKENS, {"axis": 0}), likelihoods
