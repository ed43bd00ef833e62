"""From a draft head's native graphs to what the CUDA sessions run: the verifier's program tells what the head reads.

The verifier's pass goes on with the steps of the head's fuse graph, so that one vector of a position leaves the GPU;
the head's own graph becomes a program of its own. Their tensors follow the verifier's, whose embedding it shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from engines import contract as names
from engines import draft_head as head_names
from engines.contract import INT8_CACHE, Contract
from engines.cuda.buffers import written
from engines.cuda.program import HEAD_PREFIX, PlaceColumns, Program, Receive, Step, Tell, Tensor
from engines.draft_head import DraftHeadFiles
from export.cuda_program import ProgramWriter, attribute, form_of
from export.passes.walk import only_user
from plugins.cpu.packing import unpack_block_scales, unpack_nibbles, unpack_weight
from quasar.errors import BuildError
from quasar.numerics import QuantizedWeight

_EMBEDDING = "embed_tokens.weight"
# What the likeliest tokens and their log-probabilities are made of: the LM head's kernels do that.
_LIKELIHOODS = ("TopK", "Softmax", "GatherElements", "Log")
# Caches of heads have no scales.
_FLOATS = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPrograms:
    """`verifier`: the verifier's, whose passes tell what the head reads besides; `head`: the head's own."""

    verifier: Program
    head: Program


def write_head_programs(
    directory: Path, files: DraftHeadFiles, contract: Contract, verifier: Program, weights: Path
) -> HeadPrograms:
    """The programs of an engine directory with a draft head; its tensors are appended to `weights`, the verifier's.

    Raises `BuildError` for a head that has no CUDA form.
    """
    graph, fuse = (_load(directory, name) for name in (files.graph, files.fuse))
    cache_type = _FLOATS if verifier.cache_type == INT8_CACHE else verifier.cache_type
    with weights.open("r+b") as file:
        file.seek(0, 2)
        tensors = dict(verifier.tensors)
        first = _HeadWriter(fuse, files, contract, file, tensors)
        steps = first.fuse(verifier)
        _check_names(verifier, steps)
        second = _HeadWriter(graph, files, files.contract(contract), file, tensors)
        head = second.write(cache_type)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD_PREFIX)}
    return HeadPrograms(
        verifier=replace(verifier, steps=(*verifier.steps, *steps), tensors={**verifier.tensors, **own}),
        head=replace(head, tensors={**own, _EMBEDDING: tensors[_EMBEDDING]} if second.shares_embedding else own),
    )


def _check_names(verifier: Program, steps: Sequence[Step]) -> None:
    """Raise `BuildError` where a further step writes a buffer that the verifier's own write."""
    own, further = ({name for step in part for name, _ in written(step)} for part in (verifier.steps, steps))
    if common := own & further:
        raise BuildError(f"the draft head has values of the verifier's names: {', '.join(sorted(common))}")


def _load(directory: Path, name: str) -> ir.Model:
    model = ir.load(directory / name)
    # Paths of external data are those of the engine directory.
    ir.external_data.set_base_dir(model.graph, directory)
    return model


class _HeadWriter(ProgramWriter):
    tells_likelihoods = True

    def __init__(
        self, graph: ir.Model, files: DraftHeadFiles, contract: Contract, weights: BinaryIO, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(graph, graph, contract, {}, weights)
        self._files, self.tensors = files, tensors
        table = graph.graph.initializers.get(_EMBEDDING)
        stored = None if table is None else table.const_value
        self.shares_embedding = isinstance(stored, ir.ExternalTensor) and stored.location != files.weights
        # Of every buffer; and those that hold the rows whose logits are asked for alone.
        self._columns: dict[str, int] = {}
        self._selected: set[str] = set()

    def fuse(self, verifier: Program) -> list[Step]:
        """The steps that follow the verifier's."""
        columns = dict(pair for step in verifier.steps for pair in written(step))
        for number, layer in enumerate(self._files.feature_layers):
            feature, buffer = head_names.feature_name(number), names.layer_output(layer - 1)
            if buffer not in columns:
                raise BuildError(f"the verifier's CUDA program does not hold what enters layer {layer}: {buffer}")
            self._same[feature], self._columns[buffer] = buffer, columns[buffer]
        return self.steps()

    def steps(self) -> list[Step]:
        """The graph's, after those that receive what its inputs are."""
        received: list[Step] = []
        if any(value.name == head_names.HIDDEN_STATES for value in self._native.graph.inputs):
            received = [Receive(columns=self._files.hidden_size, output=head_names.HIDDEN_STATES)]
            self._columns[head_names.HIDDEN_STATES] = self._files.hidden_size
        return [*received, *super().steps()]

    def _steps(self, node: ir.Node) -> list[Step]:
        steps = self._steps_of(node)
        for step in steps:
            self._columns |= dict(written(step))
        return steps

    def _steps_of(self, node: ir.Node) -> list[Step]:
        output = str(node.outputs[0].name)
        match node.op_type:
            case "RMSNormalization":
                return [] if _is_placed(node) else [self._place(node.inputs[0], node, output)]
            case "Concat":
                return self._concatenated(node, output)
            case "Identity" if output in (head_names.FUSED, head_names.NEXT_HIDDEN_STATES):
                source = self._name(node.inputs[0])
                return [Tell(input=source, columns=self._columns[source], selected=source in self._selected)]
            case "Gather" if output == names.TOP_TOKENS:
                table = str(node.inputs[0].name) if node.inputs[0] is not None else ""
                self._put(table, self._array(table))
                return []
            case "Identity" if output == names.TOP_TOKENS:
                return []
            case op_type if op_type in _LIKELIHOODS:
                return []
            case _:
                steps = super()._steps(node)
                if node.op_type == "Gather" and self._name(node.inputs[1]) == names.LOGITS_ROWS:
                    self._selected.add(output)
                return steps

    def _concatenated(self, node: ir.Node, output: str) -> list[Step]:
        """Its parts side by side, each after its norm where nothing else reads that."""
        producers = [None if value is None else value.producer() for value in node.inputs]
        norms = [one if one is not None and _is_placed(one) else None for one in producers]
        parts = [value if norm is None else norm.inputs[0] for value, norm in zip(node.inputs, norms, strict=True)]
        width = sum(self._columns[self._name(part)] for part in parts)
        placed: list[Step] = []
        first = 0
        for part, norm in zip(parts, norms, strict=True):
            step = self._place(part, norm, output, first=first, width=width)
            placed.append(step)
            first += step.columns
        return placed

    def _place(
        self, value: ir.Value | None, norm: ir.Node | None, output: str, *, first: int = 0, width: int | None = None
    ) -> PlaceColumns:
        source = self._name(value)
        columns, is_selected = self._columns[source], source in self._selected
        if is_selected:
            self._selected.add(output)
        weight = "" if norm is None else self._name(norm.inputs[1])
        return PlaceColumns(
            input=source,
            norm=self._put(weight, self._array(weight)) if weight else "",
            # The standard's own, where a node has none.
            epsilon=0.0 if norm is None else float(attribute(norm, "epsilon", 1e-5)),
            columns=columns,
            first=first,
            width=columns if width is None else width,
            selected=is_selected,
            output=output,
        )

    def _quantized(self, node: ir.Node, name: str) -> QuantizedWeight:
        """A linear's weight, out of the order of native kernels: heads have no other graph."""
        is_gated = bool(attribute(node, "gate", 0))
        outputs = int(attribute(node, "outputs", 0)) * (2 if is_gated else 1)
        inputs = self._columns[self._name(node.inputs[0])]
        packed, scale, form = self._array(f"{name}.packed"), self._array(self._name(node.inputs[2])), form_of(node)
        unpack = unpack_nibbles if form.nibbles else unpack_weight
        values = unpack(packed, outputs, inputs, gated=is_gated)
        if form.in_blocks:
            scale = unpack_block_scales(scale, outputs, gated=is_gated)
        return QuantizedWeight(values=values, scale=scale)

    def _precision_of(self, linear: str) -> str:  # noqa: ARG002 - all have one
        return self._files.precision

    def _hidden(self) -> int:
        return self._files.hidden_size

    def _stored_name(self, name: str) -> str:
        return name if name == _EMBEDDING and self.shares_embedding else f"{HEAD_PREFIX}{name}"


def _is_placed(norm: ir.Node) -> bool:
    """Whether a node is an RMS norm that a concatenation alone reads."""
    return norm.op_type == "RMSNormalization" and only_user(norm.outputs[0], "Concat") is not None
