"""From the native graph's structure and the canonical graph's weights to what the CUDA session runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.precisions.base import CUDA, Operator
from calibration.precisions.catalog import precision_of
from engines import contract as names
from engines.contract import Contract
from engines.cuda.program import Attention, Embed, Head, Linear, Program, Select, Step, Tensor
from plugins.gpu.packing import pack_channels
from plugins.w8a8_linear import GELU, SILU
from quasar.errors import BuildError
from quasar.numerics import QuantizedWeight

# Tensors start at multiples of this: a line of the cache, twice.
_ALIGNMENT = 256
# The heads of a group that one tile of the attention kernels holds.
_MOST_GROUP = 16


class ProgramWriter:
    """Reads the native graph node by node, and writes each tensor once, packed for the GPU."""

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
        self._tensors: dict[str, Tensor] = {}
        self._embedded: set[str] = set()
        # Values that are another one under a second name.
        self._same: dict[str, str] = {}

    def write(self, cache_type: str) -> Program:
        """The whole program; raises `BuildError` for a node that has no CUDA form."""
        steps = [step for node in self._native.graph.all_nodes() for step in self._steps(node)]
        return Program(
            cache_type=cache_type,
            reach=self._contract.max_width,
            top_k=self._contract.top_k,
            tensors=self._tensors,
            steps=tuple(steps),
        )

    def _steps(self, node: ir.Node) -> list[Step]:
        """A node's steps: none for the tail that the LM head's kernels do themselves."""
        output = str(node.outputs[0].name)
        given = [None if value is None else self._same.get(str(value.name), str(value.name)) for value in node.inputs]
        if node.op_type == "Cast" and str(given[0]) in self._embedded:
            # Rows of the table are floats as soon as they are gathered.
            self._same[output] = str(given[0])
            return []
        if node.op_type == "Gather" and given[1] == names.INPUT_IDS:
            self._embedded.add(output)
            return [self._embed(str(given[0]), output)]
        if node.op_type == "Gather" and given[1] == names.LOGITS_ROWS:
            return [Select(input=str(given[0]), columns=self._hidden(), output=output)]
        if node.op_type == "W8A8Linear":
            return [self._linear(node, given, output)]
        if node.op_type.startswith("VerifyAttention"):
            return [self._attention(node, given, output)]
        if output in (names.NEXT_TOKENS, names.TOP_TOKENS) or node.op_type in ("TopK", "ArgMax"):
            return []
        raise BuildError(f"the node {node.name or output} ({node.op_type}) has no CUDA form")

    def _embed(self, table: str, output: str) -> Embed:
        array = self._array(table)
        stored, kind = _smallest(array)
        return Embed(table=self._put(table, stored), table_type=kind, columns=array.shape[1], output=output)

    def _linear(self, node: ir.Node, given: list[str | None], output: str) -> Step:
        given = [*given, *[None] * (6 - len(given))]
        x, packed, _, bias, residual, norm = given
        name = str(packed).removesuffix(".packed")
        # Engines of earlier versions have `swiglu` in place of `gate`.
        gate = int(_attribute(node, "gate", _attribute(node, "swiglu", 0)))
        epsilon = float(_attribute(node, "epsilon", 0.0))
        if gate == GELU:
            raise BuildError(f"the linear {name} has a gate of gelu, which has no CUDA form")
        swiglu = gate == SILU
        operator = precision_of(self._linears[name]).lowering(CUDA)
        assert isinstance(operator, Operator)
        values, scale = self._array(f"{name}.weight"), self._array(f"{name}.scale")
        weight, scales = operator.pack(QuantizedWeight(values=values.T, scale=scale), swiglu)
        assert scales is not None
        common: dict[str, Any] = {
            "input": str(x),
            "norm": self._put(norm, self._array(norm)) if norm else "",
            "epsilon": epsilon,
            "weight": self._put(f"{name}.weight", weight),
            "scale": self._put(f"{name}.scale", scales),
            "bias": self._put(f"{name}.bias", pack_channels(self._array(bias), swiglu=swiglu)) if bias else "",
            "inputs": values.shape[0],
        }
        self._on_linear()
        if output == names.LOGITS:
            if residual or swiglu:
                raise BuildError("the LM head has a residual or a SwiGLU, which has no CUDA form")
            return Head(**common, vocabulary=values.shape[1])
        outputs = values.shape[1] // 2 if swiglu else values.shape[1]
        return Linear(**common, residual=residual or "", swiglu=swiglu, outputs=outputs, output=output)

    def _attention(self, node: ir.Node, given: list[str | None], output: str) -> Attention:
        qkv, past, _, _, _, cos, sin, *rest = given
        q_norm, k_norm = (*rest[1:], None, None)[:2]
        heads, kv_heads = int(_attribute(node, "num_heads", 0)), int(_attribute(node, "kv_num_heads", 0))
        size = self._contract.head_size
        if heads // kv_heads > _MOST_GROUP:
            raise BuildError(f"{heads // kv_heads} heads share a kv head; CUDA's attention takes up to {_MOST_GROUP}")
        return Attention(
            layer=[names.past_names(layer)[0] for layer in range(self._contract.num_layers)].index(str(past)),
            input=str(qkv),
            cos=self._put(str(cos), self._array(str(cos))),
            sin=self._put(str(sin), self._array(str(sin))),
            q_norm=self._put(q_norm, self._array(q_norm)) if q_norm else "",
            k_norm=self._put(k_norm, self._array(k_norm)) if k_norm else "",
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            rotary=2 * self._array(str(cos)).shape[1],
            scale=float(_attribute(node, "scale", size**-0.5)),
            softcap=float(_attribute(node, "softcap", 0.0)),
            window=int(_attribute(node, "local_window_size", 0)),
            epsilon=float(_attribute(node, "epsilon", 0.0)),
            output=output,
        )

    def _hidden(self) -> int:
        return int(self._array("embed_tokens.weight").shape[1])

    def _array(self, name: str) -> NDArray[Any]:
        value = self._values[name].const_value
        if value is None:
            raise BuildError(f"the canonical graph has no values of {name}")
        return value.numpy()

    def _put(self, name: str, array: NDArray[Any]) -> str:
        """Write a tensor unless it is there; returns its name."""
        if name not in self._tensors:
            offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
            self._file.seek(offset)
            data = np.ascontiguousarray(array)
            self._file.write(data.view(np.uint8).reshape(-1).data)
            self._tensors[name] = Tensor(offset=offset, bytes=data.nbytes)
        return name


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


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _smallest(table: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """A table float32 in the smallest type that holds its values exactly, and that type's name."""
    values = np.ascontiguousarray(table, np.float32)
    bits = values.view(np.uint32)
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype(np.uint16), "bfloat16"
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if np.array_equal(half.astype(np.float32), values):
        return half, "float16"
    return values, "float32"
