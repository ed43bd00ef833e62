"""Weights that a checkpoint already has as integers, on the grid of a precision."""

import numpy as np

from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.numerics import Float32, Int8, QuantizedWeight


def in_groups(weight: PrequantizedWeight, groups: float, lowest: int, highest: int) -> QuantizedWeight | None:
    """With so many scales a row, [outputs, groups], none of them 0, and as many offsets; None where that would round.

    That is where `groups` is no whole number of the weight's own, and where an integer lies outside of `lowest` to
    `highest`.
    """
    if groups % weight.num_groups:
        return None
    each = int(groups) // weight.num_groups
    scale = np.repeat(weight.scale, each, axis=1)
    offset = None if weight.offset is None else np.repeat(weight.offset, each, axis=1)
    values = weight.values
    if not scale.all():
        # What a scale of 0 makes of an integer is 0.
        values = (grouped(values, scale) * (scale != 0)[..., None]).reshape(values.shape)
        scale = np.where(scale == 0, np.float32(1), scale)
    if values.min(initial=0) < lowest or values.max(initial=0) > highest:
        return None
    return QuantizedWeight(values=values, scale=scale, offset=offset)


def grouped(values: Int8, scale: Float32) -> Int8:
    """Integers [outputs, inputs] by the scale [outputs, groups] that they share: [outputs, groups, inputs / groups]."""
    return values.reshape(*scale.shape, -1)
