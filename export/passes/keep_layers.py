"""The cut-down copy that probes run on: the first layers and the final norm, without the head."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from engines import contract as names
from export import names as inner
from export.builder import GraphBuilder
from export.passes.walk import prune
from quasar.checkpoints import DecoderSpec


class KeepLayers(InPlacePass):
    """Keep the first `count` layers; their caches stay inputs and outputs, the others' go.

    The head goes too. The output `hidden` [B, M, hidden + layers·H·D] is what the head would read, followed by what
    attention made in each layer: a changed order of summation shows there before quantization can round it away.
    """

    def __init__(self, count: int, spec: DecoderSpec) -> None:
        super().__init__()
        self._count = count
        self._spec = spec

    def requires(self, model: ir.Model) -> None:
        """The graph has that many layers, and its head reads the positions that `logits_rows` names."""
        produced = {value.name for node in model.graph for value in node.outputs}
        for name in (names.layer_output(self._count - 1), inner.HEAD_ROWS, inner.HEAD_INPUT):
            if name not in produced:
                raise PreconditionError(f"the graph has no value {name!r}")

    def ensures(self, model: ir.Model) -> None:
        """Exactly the kept layers' caches are left."""
        caches = sum(str(value.name).startswith(names.PAST_PREFIX) for value in model.graph.inputs)
        if caches != 2 * self._count:
            raise PostconditionError(f"{caches} cache inputs are left; {2 * self._count} were expected")
        if names.HIDDEN not in {value.name for value in model.graph.outputs}:
            raise PostconditionError(f"the graph has no output {names.HIDDEN!r}")

    def call(self, model: ir.Model) -> PassResult:
        """Feed the head from the last kept layer and drop what follows it."""
        graph = model.graph
        produced = {value.name: value for node in graph for value in node.outputs}
        head = produced[inner.HEAD_ROWS].producer()
        assert head is not None
        head.replace_input_with(0, produced[names.layer_output(self._count - 1)])
        new = GraphBuilder()
        logits_rows = next(value for value in graph.inputs if value.name == names.LOGITS_ROWS)
        seen = [
            new.op("Gather", [produced[inner.context(layer)], logits_rows], f"layers.{layer}.seen", {"axis": 1})
            for layer in range(self._count)
        ]
        hidden = new.op("Concat", [produced[inner.HEAD_INPUT], *seen], names.HIDDEN, {"axis": -1})
        hidden.type = ir.TensorType(ir.DataType.FLOAT)
        kept_layers = self._spec.layers[: self._count]
        columns = self._spec.hidden_size + sum(layer.attention.query_size for layer in kept_layers)
        hidden.shape = ir.Shape(["batch", "rows", columns])
        last = produced[inner.HEAD_INPUT].producer()
        assert last is not None
        graph.insert_after(last, new.nodes)
        for name in (names.LOGITS, names.NEXT_TOKENS, names.TOP_TOKENS):
            graph.outputs.remove(produced[name])
        graph.outputs.append(hidden)
        kept = {name for layer in range(self._count) for name in names.past_names(layer) + names.present_names(layer)}
        caches = (names.PAST_PREFIX, names.PRESENT_PREFIX)
        for values in (graph.outputs, graph.inputs):
            dropped = [v for v in values if str(v.name).startswith(caches) and v.name not in kept]
            for value in dropped:
                values.remove(value)
            if values is graph.outputs:
                prune(model)
        return PassResult(model, modified=True)
