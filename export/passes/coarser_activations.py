"""A native graph that drafts for itself: the same stored weights, with activations in fewer bits."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from calibration.precisions.base import NATIVE, Operator
from calibration.precisions.catalog import PRECISIONS


class CoarserActivations(InPlacePass):
    """Native linears → those that read the same tensors with coarser activations (`Precision.drafts_as`).

    Linears without such a form stay as they are, and so does everything else: caches and hidden states have the
    meaning that they have in the graph that verifies.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rename every such operator: inputs and attributes are those of the other."""
        modified = False
        for node in model.graph:
            if coarser := _coarser(node):
                node.op_type = coarser
                modified = True
        return PassResult(model, modified=modified)


def _coarser(node: ir.Node) -> str:
    """The operator that a node becomes; "" where it stays."""
    return _OPERATORS.get((node.domain, node.op_type), "")


def _operators() -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for precision in PRECISIONS.values():
        if not precision.drafts_as:
            continue
        own, coarser = precision.lowering(NATIVE), PRECISIONS[precision.drafts_as].lowering(NATIVE)
        if isinstance(own, Operator) and isinstance(coarser, Operator):
            found[own.domain, own.op_type] = coarser.op_type
    return found


_OPERATORS = _operators()
