"""A checkpoint's tensors as the graph gets them: smoothed, and quantized where the recipe says so, one at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.affine import QuantizedWeight, quantize_weight
from calibration.recipe import Recipe
from calibration.smoothing import Float, SmoothingFactors, fold
from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint import read_float32
from quasar.checkpoints.spec import Linear

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedLinear:
    """A linear's weight, float32 [outputs, inputs] or INT8, and its bias float32 [outputs] or None."""

    weight: Float32 | QuantizedWeight
    bias: Float32 | None


class PreparedWeights:
    """Reads, smooths and quantizes tensor by tensor: memory holds one linear at a time."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, factors: SmoothingFactors) -> None:
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._factors = factors
        self.spec = checkpoint.spec

    def is_quantized(self, linear: str) -> bool:
        """Whether the recipe gives a linear INT8 weights."""
        return self._recipe.linears[linear] != "float"

    def embedding(self) -> NDArray[Any]:
        """The embedding [vocabulary, hidden], in the checkpoint's precision."""
        return self._checkpoint.read("embed_tokens.weight")

    def vector(self, name: str) -> Float32:
        """A norm's weight float32 [channels], smoothing folded in."""
        return self._folded(name)

    def linear(self, linear: Linear) -> PreparedLinear:
        """A linear with its members' rows stacked."""
        weight = np.concatenate([self._folded(f"{member}.weight") for member in linear.members])
        bias = None
        if any(linear.bias):
            bias = np.concatenate([self._folded(f"{member}.bias") for member in linear.members])
        return PreparedLinear(weight=quantize_weight(weight) if self.is_quantized(linear.name) else weight, bias=bias)

    def _folded(self, name: str) -> Float32:
        tensor = fold(name, read_float32(self._checkpoint, name), self.spec, self._factors)
        return tensor.astype(np.float32, copy=False)


class WeightAmaxReader:
    """Linear name → amax of its weight per input channel, float32 [inputs], over all members."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._members = {linear.name: linear.members for linear in checkpoint.spec.linears()}

    def __call__(self, linear: str, /) -> Float:
        """Amax over the rows of every member."""
        weights = (read_float32(self._checkpoint, f"{member}.weight") for member in self._members[linear])
        amax: Float = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
        return amax
