"""A CUDA program of random weights for a decoder's shape, without a checkpoint or a graph: for latencies alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from engines.cuda.program import AddNorm, Attention, Embed, Head, Linear, Program, Select, Step, Tensor
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS, tiles_of
from plugins.gpu.variants import FORMS, PER_TOKEN
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import AttentionSpec
from quasar.numerics import BLOCK

_ALIGNMENT = 256
_GATES = {"gated_silu": "silu", "gated_gelu_tanh": "gelu_tanh"}
# Random bytes that are written again and again: their values change nothing about how long they take to read.
_BLOCK = 1 << 24


def write_random_program(
    spec: DecoderSpec, contract: Contract, weights: Path, cache_type: str = "float16", form: str = PER_TOKEN
) -> Program:
    """The program of a decoder with linears of a form, as the exporter would write it; its tensors go to a file."""
    with weights.open("wb") as file:
        writer = _Writer(file, form)
        steps = tuple(_steps(spec, contract, writer, cache_type))
    return Program(
        cache_type=cache_type,
        reach=contract.max_width,
        top_k=contract.top_k,
        tensors=writer.tensors,
        steps=steps,
    )


class _Writer:
    def __init__(self, file: BinaryIO, form: str) -> None:
        self._file, self.form = file, form
        self.tensors: dict[str, Tensor] = {}
        random = np.random.default_rng(0)
        self._integers = random.integers(-127, 128, _BLOCK, np.int8)
        # Exponents that keep sums of products near 1.
        self._floats = random.uniform(0.5, 1.5, _BLOCK // 4).astype(np.float32)

    def integers(self, name: str, outputs: int, inputs: int, *, gated: bool = False) -> tuple[str, str]:
        """A packed weight and its scales, of sums of about the size of the inputs; their names."""
        halves = 2 if gated else 1
        tiles = halves * tiles_of(outputs // halves, TILE_OUTPUTS)
        size, form = tiles * TILE_OUTPUTS * tiles_of(inputs, TILE_INPUTS) * TILE_INPUTS, FORMS[self.form]
        scale = np.full(tiles * TILE_OUTPUTS, 1 / 73 / inputs**0.5, np.float32)
        if form.in_blocks:
            # Integers of 4 bits are an eighteenth as large.
            kind, factor = (np.float16, 18) if form.nibbles else (np.float32, 1)
            scale = np.full(size // BLOCK * (2 if form.offsets else 1), factor * scale[0], kind)
        weight = self._put(f"{name}.weight", self._integers.view(np.uint8), size // 2 if form.nibbles else size)
        return weight, self.floats(f"{name}.scale", scale)

    def floats(self, name: str, values: NDArray[np.float32] | NDArray[np.float16]) -> str:
        """A tensor as it is."""
        return self._put(name, np.ascontiguousarray(values).view(np.uint8).reshape(-1), values.nbytes)

    def norm(self, name: str, size: int) -> str:
        """Weights of a norm."""
        return self.floats(name, self._floats[:size])

    def scales(self, name: str, size: int) -> str:
        """Scales of integers that reach to about 4."""
        return self.floats(name, (self._floats[:size] / 32).astype(np.float32))

    def table(self, name: str, rows: int, columns: int) -> str:
        """A table of bfloat16 near 1."""
        near_1 = (self._floats.view(np.uint32) >> 16).astype(np.uint16)
        return self._put(name, near_1.view(np.uint8), 2 * rows * columns)

    def _put(self, name: str, block: NDArray[np.uint8], size: int) -> str:
        if name not in self.tensors:
            offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
            self._file.seek(offset)
            left = size
            while left > 0:
                self._file.write(block[:left].data)
                left -= min(left, len(block))
            self.tensors[name] = Tensor(offset=offset, bytes=size)
        return name


def _steps(spec: DecoderSpec, contract: Contract, writer: _Writer, cache_type: str) -> Iterator[Step]:
    hidden, epsilon = spec.hidden_size, spec.rms_norm_eps
    table = writer.table("embed_tokens.weight", spec.vocab_size, hidden)
    yield Embed(table=table, table_type="bfloat16", columns=hidden, scale=spec.embedding_scale, output="embedded")
    x = "embedded"
    for number, layer in enumerate(spec.layers):
        attention, name = layer.attention, f"layers.{number}"
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        cos, sin, rotary = _tables(spec, attention, contract, writer)
        by_row = attention.qk_norm == "row"
        qkv = (heads + 2 * kv_heads) * size
        yield _linear(
            *(writer, f"{name}.qkv", x, hidden, qkv),
            norm=writer.norm(f"{name}.norm", hidden) if layer.input_norms else "",
            epsilon=epsilon,
            output=f"{name}.q",
        )
        yield Attention(
            layer=number,
            input=f"{name}.q",
            cos=cos,
            sin=sin,
            q_norm=writer.norm(f"{name}.q_norm", attention.query_size if by_row else size) if attention.qk_norm else "",
            k_norm=writer.norm(f"{name}.k_norm", attention.kv_size if by_row else size) if attention.qk_norm else "",
            row_norm=by_row,
            key_scale=writer.scales(f"{name}.key_scale", kv_heads * size) if cache_type == "int8" else "",
            value_scale=writer.scales(f"{name}.value_scale", kv_heads * size) if cache_type == "int8" else "",
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            rotary=rotary,
            scale=attention.scale,
            softcap=attention.softcap,
            window=attention.window or 0,
            epsilon=epsilon,
            output=f"{name}.context",
        )
        after = _After(writer=writer, spec=spec, norm=layer.output_norms)
        yield from after.added(f"{name}.o", f"{name}.context", heads * size, x, f"{name}.attended")
        intermediate = layer.mlp.intermediate_size
        yield _linear(
            *(writer, f"{name}.gate_up", f"{name}.attended", hidden, 2 * intermediate),
            norm=writer.norm(f"{name}.post_norm", hidden) if layer.input_norms else "",
            epsilon=epsilon,
            gate=_GATES[layer.mlp.kind],
            output=f"{name}.mlp",
        )
        x = f"{name}.output"
        yield from after.added(f"{name}.down", f"{name}.mlp", intermediate, f"{name}.attended", x)
    yield Select(input=x, columns=hidden, output="selected")
    weight, scale = writer.integers("lm_head", spec.vocab_size, hidden)
    yield Head(
        input="selected",
        norm=writer.norm("norm", hidden),
        epsilon=epsilon,
        weight=weight,
        scale=scale,
        bias="",
        softcap=spec.logits_softcap,
        form=writer.form,
        inputs=hidden,
        vocabulary=spec.vocab_size,
        likelihoods=False,
    )


def _tables(spec: DecoderSpec, attention: AttentionSpec, contract: Contract, writer: _Writer) -> tuple[str, str, int]:
    """Cosines and sines of a layer's rope, and how many values of a head are rotated: "" and 0 without one."""
    rope = attention.rope
    if rope is None:
        return "", "", 0
    number, rotary = spec.ropes.index(rope), rope.rotated(attention.head_size)
    angles = np.arange(contract.capacity)[:, None] / rope.theta ** (np.arange(rotary // 2) / (rotary // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return writer.floats(f"cos.{number}", cos), writer.floats(f"sin.{number}", sin), rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class _After:
    """What follows the linears that end in the residual stream: a norm, or nothing."""

    writer: _Writer
    spec: DecoderSpec
    norm: bool

    def added(self, name: str, x: str, inputs: int, stream: str, output: str) -> Iterator[Step]:
        """Such a linear, added to `stream`."""
        hidden, product = self.spec.hidden_size, f"{name}.product"
        if not self.norm:
            yield _linear(self.writer, name, x, inputs, hidden, residual=stream, output=output)
            return
        yield _linear(self.writer, name, x, inputs, hidden, output=product)
        yield AddNorm(
            input=product,
            norm=self.writer.norm(f"{name}.norm", hidden),
            epsilon=self.spec.rms_norm_eps,
            residual=stream,
            columns=hidden,
            output=output,
        )


def _linear(
    writer: _Writer,
    name: str,
    x: str,
    inputs: int,
    outputs: int,
    *,
    output: str,
    norm: str = "",
    epsilon: float = 0.0,
    residual: str = "",
    gate: str = "",
) -> Linear:
    weight, scale = writer.integers(name, outputs, inputs, gated=bool(gate))
    return Linear(
        input=x,
        norm=norm,
        epsilon=epsilon,
        weight=weight,
        scale=scale,
        bias="",
        residual=residual,
        gate=gate,
        form=writer.form,
        inputs=inputs,
        outputs=outputs // 2 if gate else outputs,
        output=output,
    )
