"""Clipping: a range below amax cuts off a few outliers, so that all other values are rounded more finely."""

from typing import TYPE_CHECKING

from calibration.output_error import LinearSample
from calibration.precisions.base import Precision
from quasar.numerics import split, static_scale_of

if TYPE_CHECKING:
    import torch

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
# Of the activations' magnitudes, in percent; 100 is the largest.
_PERCENTILES = (100.0, 99.999, 99.99, 99.9, 99.5)


def clip_weights(sample: LinearSample, factor: "torch.Tensor | None", precision: Precision) -> "torch.Tensor":
    """The share of each scale's range with the smallest squared error of its output, float32 [outputs, scales].

    An input's rounding error counts by its mean square, as if errors were independent.
    """
    import torch

    x = sample.x if factor is None else sample.x / factor
    weight = sample.weight if factor is None else sample.weight * factor
    inputs = (sample.token_weights[:, None] * x.square()).mean(0)
    scale = precision.scales_of(weight)
    best = torch.ones(scale.shape)
    least = torch.full(scale.shape, torch.inf)
    for share in _SHARES:
        clipped = precision.stored_scales(scale * share)
        error = split((precision.rounded(weight, clipped) - weight).square_().mul_(inputs), scale.shape[1]).sum(-1)
        better = error < least
        best[better], least[better] = share, error[better]
    return best


def static_range(
    sample: LinearSample, factor: "torch.Tensor | None", precision: Precision, amax: float
) -> tuple[float, str]:
    """The static scale with the smallest output error, and its name: "max", or a percentile of the sample.

    `amax`: the largest smoothed activation of all that calibration saw.
    """
    import numpy as np

    magnitudes = (sample.x if factor is None else sample.x / factor).abs().flatten().numpy()
    candidates = [
        (amax if percent == 100 else float(np.percentile(magnitudes, percent)), percent) for percent in _PERCENTILES
    ]
    errors = [sample.error(precision, factor, static_scale=static_scale_of(largest)) for largest, _ in candidates]
    largest, percent = candidates[errors.index(min(errors))]
    return static_scale_of(largest), "max" if percent == 100 else f"percentile {percent:g}"
