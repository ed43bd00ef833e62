"""A checkpoint's tensors as the graph gets them: smoothed, and quantized where the recipe says so, one at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.precisions.base import Precision
from calibration.precisions.catalog import precision_of
from calibration.recipe import Recipe
from calibration.smoothing import SmoothingFactors, fold, producer_factor
from quasar.checkpoints import Checkpoint, DecoderSpec
from quasar.checkpoints.checkpoint import check_finite, read_float32
from quasar.checkpoints.skipped_layers import own_name
from quasar.checkpoints.spec import Linear, split_name
from quasar.numerics import Float32, QuantizedWeight, as_half


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedLinear:
    """A linear's precision, weight and bias.

    `weight` float32 [outputs, inputs] or INT8; `bias` float32 [outputs] or None; `static_scale`: of activations, or 0.
    """

    precision: Precision
    weight: Float32 | QuantizedWeight
    bias: Float32 | None
    static_scale: float = 0.0


def in_graph(name: str, tensor: Float32, spec: DecoderSpec) -> Float32:
    """A stored tensor with the spec's factors folded in: a norm's offset, residual scales, the logits' scale."""
    module, _, parameter = name.rpartition(".")
    if spec.linear_of(module) is None and parameter == "weight" and module != "embed_tokens":
        tensor = tensor + np.float32(spec.norm_offset) if spec.norm_offset else tensor
        return tensor * np.float32(spec.logits_scale) if module == "norm" and spec.logits_scale != 1 else tensor
    scale = output_scale(module, spec)
    return tensor if scale == 1 else tensor * np.float32(scale)


def output_scale(module: str, spec: DecoderSpec) -> float:
    """The factor on what a projection makes: the layer's residual scale for o_proj and down_proj."""
    layer, part = split_name(module)
    if layer is None or part not in ("self_attn.o_proj", "mlp.down_proj"):
        return 1.0
    return spec.layers[layer].residual_scale


class PreparedWeights:
    """Reads, smooths and quantizes tensor by tensor: memory holds one linear at a time.

    `integers` gives those that a search found for a linear, before its producer's rows are smoothed, or None: then the
    weight is rounded to nearest. `static_scales`: of activations, by linear name. `remaining`: the layers that the
    graph has, where it has not all; names and spec are the graph's, everything else the whole model's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        factors: SmoothingFactors,
        integers: Callable[[str], QuantizedWeight | None] = lambda linear: None,
        static_scales: Mapping[str, float] | None = None,
        remaining: Sequence[int] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._factors = factors
        self._integers = integers
        self._static_scales = static_scales or {}
        self._whole = whole = checkpoint.spec
        self._remaining = range(whole.num_layers) if remaining is None else remaining
        self.spec = whole.keep_layers(self._remaining)

    def is_quantized(self, linear: str) -> bool:
        """Whether the recipe gives a linear INT8 weights."""
        return self._recipe.is_quantized(self._own(linear))

    def embedding(self) -> NDArray[Any]:
        """The embedding [vocabulary, hidden]: in 16 bits where any linear is quantized, else as the checkpoint has it.

        An engine in float32 agrees with the float model to rounding, also where its head reads the same table.
        """
        from calibration.stored_table import in_16_bits  # with ml_dtypes, which a refused build does not wait for

        name = "embed_tokens.weight"
        table = check_finite(self._checkpoint, name, self._checkpoint.read(name))
        return in_16_bits(table) if self._recipe.quantizes else table

    def vector(self, name: str) -> Float32:
        """A norm's weight float32 [channels], smoothing folded in."""
        return self._folded(self._own(name))

    def linear(self, linear: Linear) -> PreparedLinear:
        """A linear with its members' rows stacked."""
        linear = replace(
            linear, name=self._own(linear.name), members=tuple(self._own(member) for member in linear.members)
        )
        bias = None
        if any(linear.bias):
            bias = np.concatenate([self._folded(f"{member}.bias") for member in linear.members])
        precision = precision_of(self._recipe.linears[linear.name])
        # A static scale is that of the float model's activations, and the head's have the logits' factor here.
        logits_scale = self._whole.logits_scale if linear.name == self._whole.head.name else 1.0
        return PreparedLinear(
            precision=precision,
            weight=self._weight(linear, precision),
            bias=bias,
            static_scale=self._static_scales.get(linear.name, 0.0) * logits_scale,
        )

    def _own(self, name: str) -> str:
        return own_name(name, self._remaining)

    def _weight(self, linear: Linear, precision: Precision) -> Float32 | QuantizedWeight:
        found = self._integers(linear.name) if precision.is_quantized else None
        if found is not None:
            scale = precision.stored_scales(self._smoothed_rows(linear, found.scale))
            if precision.in_blocks:
                # Where one group has all inputs, the folder tells no scale per output from it.
                scale = scale.reshape(len(scale), -1)
            offset = None if found.offset is None else as_half(self._smoothed_rows(linear, found.offset))
            return QuantizedWeight(values=found.values, scale=scale, offset=offset)
        weight = np.concatenate([self._folded(f"{member}.weight") for member in linear.members])
        return precision.quantize(weight)

    def _smoothed_rows(self, linear: Linear, scale: Float32) -> Float32:
        """A row divided by its consumer's factor, or times the layer's scale, keeps its integers: its scale changes."""
        rows = np.full(len(scale), 1 / output_scale(linear.members[0], self._whole), np.float64)
        start = 0
        for member, count in zip(linear.members, linear.rows, strict=True):
            if (factor := producer_factor(member, self._whole, self._factors)) is not None:
                rows[start : start + count] *= factor
            start += count
        smoothed: Float32 = (scale / rows.reshape(-1, *[1] * (scale.ndim - 1))).astype(np.float32)
        return smoothed

    def _folded(self, name: str) -> Float32:
        tensor = in_graph(name, read_float32(self._checkpoint, name), self._whole)
        tensor = fold(name, tensor, self._whole, self._factors)
        return tensor.astype(np.float32, copy=False)
