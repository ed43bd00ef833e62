"""Dropping what nothing uses."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def prune(model: ir.Model) -> bool:
    """Remove nodes and initializers that no output needs; says whether anything went."""
    return bool(RemoveUnusedNodesPass()(model).modified)
