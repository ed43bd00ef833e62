"""The cut-down copy that probes run on: the first layers, the final norm and the head."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from engines import contract as names
from export import names as inner
from export.passes.prune import prune


class KeepLayers(InPlacePass):
    """Keep the first `count` layers; their caches stay inputs and outputs, the others' go."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def requires(self, model: ir.Model) -> None:
        """The graph has that many layers, and its head reads the rows that `logits_rows` names."""
        produced = {value.name for node in model.graph for value in node.outputs}
        for name in (inner.layer_output(self._count - 1), inner.HEAD_ROWS):
            if name not in produced:
                raise PreconditionError(f"the graph has no value {name!r}")

    def ensures(self, model: ir.Model) -> None:
        """Exactly the kept layers' caches are left."""
        caches = sum(str(value.name).startswith("past_key_values.") for value in model.graph.inputs)
        if caches != 2 * self._count:
            raise PostconditionError(f"{caches} cache inputs are left; {2 * self._count} were expected")

    def call(self, model: ir.Model) -> PassResult:
        """Feed the head from the last kept layer and drop what follows it."""
        graph = model.graph
        produced = {value.name: value for node in graph for value in node.outputs}
        head = produced[inner.HEAD_ROWS].producer()
        assert head is not None
        if head.inputs[0] is produced[inner.layer_output(self._count - 1)]:
            return PassResult(model, modified=False)
        head.replace_input_with(0, produced[inner.layer_output(self._count - 1)])
        kept = {name for layer in range(self._count) for name in names.past_names(layer) + names.present_names(layer)}
        caches = ("past_key_values.", "present.")
        for values in (graph.outputs, graph.inputs):
            dropped = [v for v in values if str(v.name).startswith(caches) and v.name not in kept]
            for value in dropped:
                values.remove(value)
            if values is graph.outputs:
                prune(model)
        return PassResult(model, modified=True)
