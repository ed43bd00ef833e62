"""From the native graph's structure and the canonical graph's weights to what the CUDA session runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.precisions.base import CUDA, Operator
from calibration.precisions.catalog import precision_of
from calibration.stored_table import exact_type
from engines import contract as names
from engines.contract import INT8_CACHE, Contract
from engines.cuda.program import AddNorm, Attention, Embed, Head, Linear, Program, Select, Step, Tensor
from export.passes.walk import only_user, other_input
from plugins.gpu.packing import pack_channels
from plugins.gpu.variants import FORMS, GATES, KernelForm
from quasar.errors import BuildError
from quasar.numerics import QuantizedWeight

# Tensors start at multiples of this: a line of the cache, twice.
_ALIGNMENT = 256
# Native operators of linears → in blocks, with weights of 4 bits, with activations of 16 bits.
_LINEARS = {
    "W8A8Linear": (False, False, False),
    "W8A8BlockLinear": (True, False, False),
    "W4A8BlockLinear": (True, True, False),
    "W4A16BlockLinear": (True, True, True),
}
# The heads of a group that one tile of the attention kernels holds.
_MOST_GROUP = 16


class ProgramWriter:
    """Reads the native graph node by node, and writes each tensor once, packed for the GPU."""

    tells_likelihoods = False

    def __init__(
        self,
        native: ir.Model,
        canonical: ir.Model,
        contract: Contract,
        linears: Mapping[str, str],
        weights: BinaryIO,
        *,
        on_linear: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is written yet.

        Args:
            native: the graph of native operators: a linear with its neighbours is one node there.
            canonical: the graph whose weights have no back end's order.
            linears: precision by linear.
            weights: the file that tensors go to.
            on_linear: called after each linear.
        """
        self._native, self._contract, self._linears, self._file = native, contract, linears, weights
        self._values = canonical.graph.initializers
        self._on_linear = on_linear
        self._has_scales = False
        self.tensors: dict[str, Tensor] = {}
        # Nodes that a step before them has taken in.
        self._taken: set[ir.Node] = set()
        # Values that are another one under a second name.
        self._same: dict[str, str] = {}
        # A sum → the RMS norm whose output it adds to the residual stream.
        self._normed: dict[ir.Node, ir.Node] = {}

    def write(self, cache_type: str) -> Program:
        """The whole program; raises `BuildError` for a node that has no CUDA form.

        `cache_type` int8: the native graph's caches are integers, and their scales are taken.
        """
        self._has_scales = cache_type == INT8_CACHE
        return Program(
            cache_type=cache_type,
            reach=self._contract.max_width,
            top_k=self._contract.top_k,
            steps=tuple(self.steps()),
            tensors=dict(self.tensors),
        )

    def steps(self) -> list[Step]:
        """The steps of the graph's nodes, whose tensors are written."""
        return [step for node in self._native.graph.all_nodes() for step in self._steps(node)]

    def _steps(self, node: ir.Node) -> list[Step]:
        """A node's steps: none for what another step's kernels do themselves."""
        if node in self._taken:
            return []
        output = str(node.outputs[0].name)
        given = [None if value is None else self._same.get(str(value.name), str(value.name)) for value in node.inputs]
        if node.op_type == "Gather" and given[1] == names.INPUT_IDS:
            return [self._embed(node, str(given[0]))]
        if node.op_type == "Gather" and given[1] == names.LOGITS_ROWS:
            return [Select(input=str(given[0]), columns=self._hidden(), output=output)]
        if node.op_type in _LINEARS:
            return [self._linear(node, given)]
        if node.op_type == "RMSNormalization" and (add := only_user(node.outputs[0], "Add")) is not None:
            self._normed[add] = node
            return []
        if node in self._normed:
            return [self._add_norm(node, output)]
        if node.op_type.startswith("VerifyAttention"):
            return [self._attention(node, given, output)]
        if output in (names.NEXT_TOKENS, names.TOP_TOKENS) or node.op_type in ("TopK", "ArgMax"):
            return []
        raise BuildError(f"the node {node.name or output} ({node.op_type}) has no CUDA form")

    def _embed(self, node: ir.Node, table: str) -> Embed:
        value, scale = node.outputs[0], 1.0
        output = str(value.name)
        # Rows of the table are floats as soon as they are gathered, and scaled.
        if (cast := only_user(value, "Cast")) is not None:
            value = self._take(cast, output)
        if (mul := only_user(value, "Mul")) is not None and (factor := _scalar(other_input(mul, value))) is not None:
            value, scale = self._take(mul, output), factor
        array = self._array(table)
        stored, kind = _smallest(array)
        return Embed(
            table=self._put(table, stored), table_type=kind, columns=array.shape[1], scale=scale, output=output
        )

    def _take(self, node: ir.Node, name: str) -> ir.Value:
        """Leave a node out: its output is what the step of the value `name` gives."""
        self._taken.add(node)
        self._same[str(node.outputs[0].name)] = name
        return node.outputs[0]

    def _name(self, value: ir.Value | None) -> str:
        name = str(value.name) if value is not None else ""
        return self._same.get(name, name)

    def _add_norm(self, add: ir.Node, output: str) -> AddNorm:
        norm = self._normed[add]
        residual = other_input(add, norm.outputs[0])
        weight = self._name(norm.inputs[1])
        return AddNorm(
            input=self._name(norm.inputs[0]),
            norm=self._put(weight, self._array(weight)),
            # The standard's own, where a node has none.
            epsilon=float(attribute(norm, "epsilon", 1e-5)),
            residual=self._name(residual),
            columns=len(self._array(weight)),
            output=output,
        )

    def _softcap(self, logits: ir.Value) -> tuple[ir.Value, float]:
        """What softcap · tanh(logits / softcap) gives, and softcap, where that follows; else `logits` and 0."""
        divide = only_user(logits, "Div")
        bounded = None if divide is None else only_user(divide.outputs[0], "Tanh")
        multiply = None if bounded is None else only_user(bounded.outputs[0], "Mul")
        if divide is None or bounded is None or multiply is None:
            return logits, 0.0
        caps = _scalar(divide.inputs[1]), _scalar(other_input(multiply, bounded.outputs[0]))
        if caps[0] is None or caps[0] != caps[1]:
            return logits, 0.0
        self._taken |= {divide, bounded, multiply}
        return multiply.outputs[0], caps[0]

    def _linear(self, node: ir.Node, given: list[str | None]) -> Step:
        given = [*given, *[None] * (6 - len(given))]
        x, packed, _, bias, residual, norm = given
        name = str(packed).removesuffix(".packed")
        # Graphs of earlier versions have `swiglu`, 0 or 1.
        gate = GATES[int(attribute(node, "gate", attribute(node, "swiglu", 0)))]
        epsilon, gated = float(attribute(node, "epsilon", 0.0)), bool(gate)
        operator = precision_of(self._precision_of(name)).lowering(CUDA)
        assert isinstance(operator, Operator)
        form, quantized = form_of(node), self._quantized(node, name)
        weight, scales = operator.pack(quantized, gated)
        assert scales is not None
        all_outputs, inputs = quantized.values.shape
        common: dict[str, Any] = {
            "input": str(x),
            "norm": self._put(norm, self._array(norm)) if norm else "",
            "epsilon": epsilon,
            "weight": self._put(f"{name}.weight", weight),
            "scale": self._put(f"{name}.scale", scales),
            "bias": self._put(f"{name}.bias", pack_channels(self._array(bias), gated=gated)) if bias else "",
            "form": form.name,
            "inputs": inputs,
        }
        self._on_linear()
        logits, softcap = self._softcap(node.outputs[0])
        if logits.name == names.LOGITS:
            if residual or gated:
                raise BuildError("the LM head has a residual or a gate, which has no CUDA form")
            return Head(**common, softcap=softcap, vocabulary=all_outputs, likelihoods=self.tells_likelihoods)
        outputs, output = all_outputs // 2 if gated else all_outputs, str(node.outputs[0].name)
        return Linear(**common, residual=residual or "", gate=gate, outputs=outputs, output=output)

    def _quantized(self, node: ir.Node, name: str) -> QuantizedWeight:
        """A linear's weight, as the canonical graph has it: in 4 bits where it has them."""
        values, scale = self._array(f"{name}.weight").astype(np.int8, copy=False), self._array(f"{name}.scale")
        offset = self._array(f"{name}.offset").T if form_of(node).offsets else None
        return QuantizedWeight(values=values.T, scale=scale.T, offset=offset)

    def _attention(self, node: ir.Node, given: list[str | None], output: str) -> Attention:
        qkv, past, _, _, _, cos, sin, _, q_norm, k_norm, _, _, key_scale, value_scale = [*given, *[None] * 14][:14]
        if not self._has_scales:
            key_scale = value_scale = None
        heads, kv_heads = int(attribute(node, "num_heads", 0)), int(attribute(node, "kv_num_heads", 0))
        size, angles = self._contract.head_size, self._array(str(cos)).shape[1]
        if heads // kv_heads > _MOST_GROUP:
            raise BuildError(f"{heads // kv_heads} heads share a kv head; CUDA's attention takes up to {_MOST_GROUP}")
        return Attention(
            layer=[names.past_names(layer)[0] for layer in range(self._contract.num_layers)].index(str(past)),
            input=str(qkv),
            # A layer that does not rotate has tables of 0 columns.
            cos=self._put(str(cos), self._array(str(cos))) if angles else "",
            sin=self._put(str(sin), self._array(str(sin))) if angles else "",
            q_norm=self._put(q_norm, self._array(q_norm)) if q_norm else "",
            k_norm=self._put(k_norm, self._array(k_norm)) if k_norm else "",
            row_norm=bool(q_norm) and len(self._array(str(q_norm))) > size,
            key_scale=self._put(key_scale, self._array(key_scale)) if key_scale else "",
            value_scale=self._put(value_scale, self._array(value_scale)) if value_scale else "",
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            rotary=2 * angles,
            scale=float(attribute(node, "scale", size**-0.5)),
            softcap=float(attribute(node, "softcap", 0.0)),
            window=int(attribute(node, "local_window_size", 0)),
            epsilon=float(attribute(node, "epsilon", 0.0)),
            output=output,
        )

    def _hidden(self) -> int:
        return int(self._array("embed_tokens.weight").shape[1])

    def _array(self, name: str) -> NDArray[Any]:
        # What only a lowered graph has is there: tables of 0 columns.
        value = self._values.get(name) or self._native.graph.initializers[name]
        if value.const_value is None:
            raise BuildError(f"the graph has no values of {name}")
        return value.const_value.numpy()

    def _put(self, name: str, array: NDArray[Any]) -> str:
        """Write a tensor unless it is there; returns its name in the file."""
        name = self._stored_name(name)
        if name not in self.tensors:
            offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
            self._file.seek(offset)
            data = np.ascontiguousarray(array)
            self._file.write(data.view(np.uint8).reshape(-1).data)
            self.tensors[name] = Tensor(offset=offset, bytes=data.nbytes)
        return name

    def _stored_name(self, name: str) -> str:
        return name

    def _precision_of(self, linear: str) -> str:
        return self._linears[linear]


def write_program(
    directory: Path,
    graphs: tuple[str, str],
    contract: Contract,
    linears: Mapping[str, str],
    weights: Path,
    cache_type: str,
    on_linear: Callable[[], None] = lambda: None,
) -> Program:
    """The program of an engine directory whose native and canonical graph are `graphs`; its tensors go to `weights`."""
    native, canonical = (ir.load(directory / name) for name in graphs)
    with weights.open("wb") as file:
        return ProgramWriter(native, canonical, contract, linears, file, on_linear=on_linear).write(cache_type)


def form_of(node: ir.Node) -> KernelForm:
    """Of the kernel that a native linear becomes."""
    *of_operator, has_offsets = *_LINEARS[node.op_type], bool(attribute(node, "offsets", 0))
    return next(
        form
        for form in FORMS.values()
        if [form.in_blocks, form.nibbles, form.planes] == of_operator and form.offsets == has_offsets
    )


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or the default where the node has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def _scalar(value: ir.Value | None) -> float | None:
    """The one number of a constant; None where it is none."""
    array = None if value is None or value.const_value is None else value.const_value.numpy()
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _smallest(table: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """A table in the smallest type that holds its values exactly, and that type's name.

    Tables in float32 are those of engines that earlier versions built.
    """
    kind = exact_type(table) or np.dtype(np.float32)
    return np.ascontiguousarray(table, kind), kind.name
