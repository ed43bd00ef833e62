"""W4A8 and W4A16: 4-bit weights in groups of inputs, and activations of 8 bits in blocks of 32, or of 16."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calibration.precisions.base import (
    CUDA,
    NATIVE,
    ONNXRUNTIME,
    TENSORRT,
    AsItIs,
    LinearGraph,
    Lowering,
    Operator,
    Refused,
    Value,
)
from calibration.precisions.block import InBlocks, matmul_nbits
from calibration.precisions.held import in_groups
from calibration.precisions.int8 import dequantized
from plugins.cpu.library import DOMAIN
from plugins.cpu.packing import pack_block_scales, pack_nibbles
from plugins.gpu import packing as tiles
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.numerics import (
    BLOCK,
    HALF_STEP,
    HIGHEST_NIBBLE,
    LOWEST_NIBBLE,
    Array,
    Float32,
    Int8,
    QuantizedWeight,
    as_half,
    nearest_nibble,
    nibble_scales_of,
    quantize_nibbles,
    split,
    stored_nibble_scales,
)

if TYPE_CHECKING:
    import torch

_HALF_BYTES = 2
# The largest integer above an offset.
_MOST = HIGHEST_NIBBLE - LOWEST_NIBBLE
_NO_TENSORRT = Refused(reason="TensorRT has no matmul of INT8 activations with INT4 weights")
_NO_TENSORRT_OFFSETS = Refused(reason="TensorRT has INT4 weights around zero alone, without offsets")
# What checkpoints of the field mostly have.
_WIDE = 4 * BLOCK


def _stock(group: int, *, floats: bool = False) -> Operator:
    """With blocks of 32, whatever the group: with wider ones its bits depend on the width.

    With `floats` they do in any case: one position and several are multiplied in different ways.
    """
    return matmul_nbits(
        4,
        lambda weight, gated: (_pairs(weight.values), np.repeat(weight.scale, group // BLOCK, axis=1)),
        integers=not floats,
    )


def _native(group: int, *, offsets: bool = False, floats: bool = False) -> Operator:
    return Operator(
        op_type="W4A16BlockLinear" if floats else "W4A8BlockLinear",
        domain=DOMAIN,
        pack=lambda weight, gated: (
            pack_nibbles(weight.values + np.int8(LOWEST_NIBBLE) if offsets else weight.values, gated=gated),
            _halves(weight, gated=gated),
        ),
        attributes=lambda outputs, inputs: {"group_size": group, "offsets": int(offsets)},
    )


def _cuda(group: int, *, offsets: bool = False, floats: bool = False) -> Operator:
    """With a scale for every block, and an offset after it: those of wider groups are repeated."""

    def of_blocks(part: Float32, *, gated: bool) -> NDArray[np.float16]:
        return tiles.pack_block_scales(np.repeat(part.astype(np.float16), group // BLOCK, axis=1), gated=gated)

    def pack(weight: QuantizedWeight, gated: bool) -> tuple[NDArray[Any], NDArray[Any]]:
        scale = of_blocks(weight.scale, gated=gated)
        if weight.offset is not None:
            scale = np.stack([scale, of_blocks(weight.offset, gated=gated)], axis=2)
        values = weight.values + np.int8(LOWEST_NIBBLE) if offsets else weight.values
        return tiles.pack_nibbles(values, gated=gated), scale

    return Operator(op_type="W4A16BlockLinear" if floats else "W4A8BlockLinear", domain=tiles.DOMAIN, pack=pack)


def _halves(weight: QuantizedWeight, *, gated: bool) -> NDArray[np.float16]:
    """Scales, and after those of a group of a tile its offsets, as the operator reads them."""
    parts = [weight.scale] if weight.offset is None else [weight.scale, weight.offset]
    return np.concatenate([pack_block_scales(part.astype(np.float16), gated=gated) for part in parts], axis=2)


def _lowerings(group: int, *, offsets: bool = False, floats: bool = False) -> dict[str, Lowering]:
    """By back end; `floats`: activations are not rounded.

    ONNX Runtime's own operator has zero points of 4 bits, and no offsets: with those it computes the canonical form, in
    floats and slowly, where the last bits depend on the width. An engine without native kernels decodes plainly then.
    """
    return {
        ONNXRUNTIME: AsItIs() if offsets else _stock(group, floats=floats),
        NATIVE: _native(group, offsets=offsets, floats=floats),
        TENSORRT: _NO_TENSORRT_OFFSETS if offsets and floats else AsItIs() if floats else _NO_TENSORRT,
        CUDA: _cuda(group, offsets=offsets, floats=floats),
    }


class Nibbles(InBlocks):
    """Blocks of a token's activations / their amax → Q/DQ with scale 1/127 → MatMul with INT4 weights."""

    name = "w4a8"
    choice = "w4a8"
    help = f"INT4 weights in groups of {BLOCK}"
    label = "nibbles"
    form = f"in groups of {BLOCK}"
    title = f"W4A8 {form}"
    colour = "#e69138"
    weight_bits = 4
    group: ClassVar[int] = BLOCK
    clips_weights = True
    lowerings: ClassVar = _lowerings(BLOCK)

    def scales_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """One scale per row and group, a float16 number."""
        return nibble_scales_of(weight, self.group)

    def nearest(self, weight: "torch.Tensor", step: "torch.Tensor", /) -> "torch.Tensor":
        """Integers from -8 to 7."""
        return nearest_nibble(weight, step)

    def quantize(self, weight: Float32) -> Float32 | QuantizedWeight:
        """Values int8 [outputs, inputs] with their scales."""
        return quantize_nibbles(weight, self.group)

    def stored_scales(self, scale: Array) -> Array:
        """The float16 next to each, none of them 0."""
        return stored_nibble_scales(scale)

    def held(self, weight: PrequantizedWeight) -> QuantizedWeight | None:
        """Integers of 4 bits; None where a scale is too small or too large for a float16 of full precision."""
        kept = in_groups(weight, weight.values.shape[1] / self.group, LOWEST_NIBBLE, HIGHEST_NIBBLE)
        if kept is None or kept.offset is not None:
            return None
        scale = _halves_next_to(kept.scale)
        return None if scale is None else QuantizedWeight(values=kept.values, scale=scale)

    def num_bytes(self, outputs: int, inputs: int) -> int:
        """Half a byte a weight, and float16 scales."""
        return outputs * (inputs // 2 + _HALF_BYTES * (inputs // self.group))

    def weight_of(self, graph: LinearGraph, weight: QuantizedWeight) -> Value:
        """From an INT4 tensor."""
        return dequantized(graph, weight, group=self.group, stored="int4")


class WideNibbles(Nibbles):
    """The same with a scale for every 128 inputs of a weight."""

    name = "w4a8-128"
    choice = "w4a8-128"
    help = f"in groups of {_WIDE}"
    label = "wide nibbles"
    form = f"in groups of {_WIDE}"
    title = f"W4A8 {form}"
    colour = "#f6b26b"
    group = _WIDE
    is_on_ladder = False
    input_multiple = _WIDE
    lowerings: ClassVar = _lowerings(_WIDE)


class OffsetNibbles(Nibbles):
    """4-bit weights from 0 up, with an offset for every group beside its scale: what zero points of checkpoints become.

    A checkpoint brings the integers: none are searched.
    """

    name = "w4a8-offset"
    choice = "w4a8-offset"
    help = f"{Nibbles.help}, with an offset for each"
    label = "nibbles with offsets"
    form = f"{Nibbles.form} with offsets"
    title = f"W4A8 {form}"
    colour = "#c27ba0"
    has_offsets = True
    # On ONNX Runtime's own kernels; native ones do.
    has_integer_activations = False
    is_on_ladder = False
    lowerings: ClassVar = _lowerings(BLOCK, offsets=True)

    def quantize(self, weight: Float32) -> Float32 | QuantizedWeight:
        """Between the smallest and the largest weight of a group."""
        groups = weight.shape[1] // self.group
        parts = split(weight, groups)
        low, high = parts.min(axis=-1), parts.max(axis=-1)
        scale, offset = stored_nibble_scales((high - low) / _MOST), as_half(low)
        values = ((parts - offset[..., None]) / scale[..., None]).round().clip(0, _MOST)
        return QuantizedWeight(values=values.reshape(weight.shape).astype(np.int8), scale=scale, offset=offset)

    def held(self, weight: PrequantizedWeight) -> QuantizedWeight | None:
        """Integers of 4 bits, around zero or from 0 up; offsets become the float16 next to each."""
        kept = in_groups(weight, weight.values.shape[1] / self.group, LOWEST_NIBBLE, _MOST)
        if kept is None or kept.offset is None:
            return None
        values, offset, scale = kept.values, kept.offset, _halves_next_to(kept.scale)
        if values.min(initial=0) < 0:
            values, offset = values - np.int8(LOWEST_NIBBLE), offset + LOWEST_NIBBLE * kept.scale
        if scale is None or values.max(initial=0) > _MOST:
            return None
        return QuantizedWeight(values=values, scale=scale, offset=as_half(offset))

    def num_bytes(self, outputs: int, inputs: int) -> int:
        """And as many offsets as scales."""
        return super().num_bytes(outputs, inputs) + outputs * _HALF_BYTES * (inputs // self.group)

    def weight_of(self, graph: LinearGraph, weight: QuantizedWeight) -> Value:
        """From a UINT4 tensor, group by group."""
        inputs, groups = weight.values.shape[1], weight.scale.shape[1]
        assert weight.offset is not None
        floats = dequantized(graph, weight, group=self.group, stored="uint4")
        split_at = graph.constant(f"split_groups.{inputs}.{groups}", [groups, inputs // groups, -1])
        grouped = graph.op("Reshape", [floats, split_at], "groups")
        each = graph.op(
            "Unsqueeze", [graph.weight("offset", weight.offset.T), graph.constant("second_axis", [1])], "offsets"
        )
        shifted = graph.op("Add", [grouped, each], "shifted")
        return graph.op("Reshape", [shifted, graph.constant(f"merge_groups.{inputs}", [inputs, -1])], "weight_floats")


class WideOffsetNibbles(OffsetNibbles):
    """The same for every 128 inputs."""

    name = "w4a8-128-offset"
    choice = "w4a8-128-offset"
    help = f"{WideNibbles.help}, with an offset for each"
    label = "wide nibbles with offsets"
    form = f"{WideNibbles.form} with offsets"
    title = f"W4A8 {form}"
    colour = "#d5a6bd"
    group = _WIDE
    input_multiple = _WIDE
    lowerings: ClassVar = _lowerings(_WIDE, offsets=True)


class _FloatActivations(InBlocks):
    """What sets W4A16 apart from W4A8: activations are the floats that come.

    Kernels for integers give them 16 bits under a scale for each block: an error of at most amax / 65,278.
    """

    has_integer_activations = False
    is_on_ladder = False

    def round_activations(self, x: "torch.Tensor", _static_scale: float, /) -> "torch.Tensor":
        """The activations themselves."""
        return x

    def canonical(
        self, graph: LinearGraph, x: Value, weight: Float32 | QuantizedWeight, _static_scale: float, /
    ) -> Value:
        """Y = MatMul(x, dequantized W)."""
        assert isinstance(weight, QuantizedWeight)
        return graph.product("MatMul", [x, self.weight_of(graph, weight)], "matmul")


class FloatNibbles(_FloatActivations, Nibbles):
    """MatMul of activations as they are with INT4 weights; kernels for integers give them 16 bits."""

    name = "w4a16"
    choice = "w4a16"
    help = f"{Nibbles.help}, activations of 16 bits"
    label = "nibbles times floats"
    title = f"W4A16 {Nibbles.form}"
    form = f"{Nibbles.form} with float activations"
    colour = "#93c47d"
    drafts_as = Nibbles.name
    lowerings: ClassVar = _lowerings(BLOCK, floats=True)


class WideFloatNibbles(_FloatActivations, WideNibbles):
    """The same with a scale for every 128 inputs of a weight."""

    name = "w4a16-128"
    choice = "w4a16-128"
    help = f"{WideNibbles.help}, activations of 16 bits"
    label = "wide nibbles times floats"
    title = f"W4A16 {WideNibbles.form}"
    form = f"{WideNibbles.form} with float activations"
    colour = "#b6d7a8"
    drafts_as = WideNibbles.name
    lowerings: ClassVar = _lowerings(_WIDE, floats=True)


class OffsetFloatNibbles(_FloatActivations, OffsetNibbles):
    """MatMul of activations as they are with 4-bit weights that have offsets."""

    name = "w4a16-offset"
    choice = "w4a16-offset"
    help = f"{FloatNibbles.help}, with an offset for each group"
    label = "nibbles with offsets times floats"
    title = f"W4A16 {OffsetNibbles.form}"
    form = f"{OffsetNibbles.form} with float activations"
    colour = "#76a5af"
    drafts_as = OffsetNibbles.name
    lowerings: ClassVar = _lowerings(BLOCK, offsets=True, floats=True)


class WideOffsetFloatNibbles(_FloatActivations, WideOffsetNibbles):
    """The same for every 128 inputs."""

    name = "w4a16-128-offset"
    choice = "w4a16-128-offset"
    help = f"{WideFloatNibbles.help}, with an offset for each group"
    label = "wide nibbles with offsets times floats"
    title = f"W4A16 {WideOffsetNibbles.form}"
    form = f"{WideOffsetNibbles.form} with float activations"
    colour = "#a2c4c9"
    drafts_as = WideOffsetNibbles.name
    lowerings: ClassVar = _lowerings(_WIDE, offsets=True, floats=True)


def _halves_next_to(scale: Float32) -> Float32 | None:
    """The float16 next to every scale; None where one of them has not the bits of a normal number."""
    halves = as_half(scale)
    return None if (np.abs(halves - scale) > HALF_STEP * np.abs(scale)).any() else halves


def _pairs(values: Int8) -> NDArray[Any]:
    """Int8 [N, K] → uint8 [N, K / 32, 16], each value plus 8, two a byte, as MatMulNBits reads it."""
    columns = (values + np.int8(8)).astype(np.uint8).reshape(len(values), -1, BLOCK)
    packed: NDArray[Any] = columns[:, :, ::2] | columns[:, :, 1::2] << np.uint8(4)
    return packed
