"""What passes do to a graph by hand: walk from node to node, each of an expected kind, insert, and drop."""

import onnx_ir as ir
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.builder import GraphBuilder


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that is there."""
    value = node.inputs[index]
    assert value is not None
    return value


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """Of two inputs, the other one."""
    return input_of(node, 1) if node.inputs[0] is value else input_of(node, 0)


def consumer(value: ir.Value, kind: str) -> ir.Node:
    """The one node that reads a value; raises `PreconditionError` if there are others or it is of another kind."""
    node = only_user(value, kind)
    if node is None:
        raise PreconditionError(f"{value.name} is not read by one {kind}: this is no canonical linear")
    return node


def only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The node that alone reads a value, if it is of that kind and the value is no output of the graph."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != kind or value.is_graph_output():
        return None
    return uses[0].node


def insert_after(graph: ir.Graph, value: ir.Value, new: GraphBuilder) -> None:
    """Insert new nodes after the one that makes a value."""
    node = value.producer()
    assert node is not None
    graph.insert_after(node, new.nodes)


def prune(model: ir.Model) -> bool:
    """Remove nodes and initializers that no output needs; says whether anything went."""
    return bool(RemoveUnusedNodesPass()(model).modified)
