"""How much each linear loses by quantization, on a sample of its own inputs."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.affine import dequantize_tokens, dequantize_weight, quantize_tokens, quantize_weight
from calibration.recipe import Recipe
from calibration.smoothing import SmoothingFactors
from calibration.statistics import ActivationStatistics
from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint import read_float32

Float32 = NDArray[np.float32]

_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFigures:
    """One linear: precision, SQNR of its output in dB (None: float), amax of its input before and after smoothing."""

    precision: str
    sqnr_db: float | None
    amax_before: float
    amax_after: float

    def to_json(self) -> dict[str, Any]:
        """The report's entry."""
        return asdict(self)


def output_sqnr_db(x: Float32, weight: Float32, s: Float32) -> float:
    """10 log10(Σ y² / Σ (y - ŷ)²) of y = x Wᵀ against its W8A8 form with smoothing factor s.

    x float32 [rows, inputs], weight float32 [outputs, inputs], s float32 [inputs].
    """
    activations = dequantize_tokens(*quantize_tokens(x / s))
    noise = signal = 0.0
    for start in range(0, len(weight), _BLOCK_ROWS):
        block = weight[start : start + _BLOCK_ROWS]
        exact = x @ block.T
        quantized = activations @ dequantize_weight(quantize_weight(block * s)).T
        noise += float(np.square(exact - quantized, dtype=np.float64).sum())
        signal += float(np.square(exact, dtype=np.float64).sum())
    return round(10 * float(np.log10(signal / max(noise, 1e-30))), 2)


def linear_figures(
    checkpoint: Checkpoint, recipe: Recipe, factors: SmoothingFactors, statistics: ActivationStatistics
) -> dict[str, LinearFigures]:
    """The figures of every linear, in graph order, one linear in memory at a time."""
    figures: dict[str, LinearFigures] = {}
    for linear in checkpoint.spec.linears():
        amax = statistics.amax[linear.name]
        factor = factors.of(linear.name)
        s = np.ones_like(amax) if factor is None else np.asarray(factor, np.float32)
        sqnr = None
        if recipe.linears[linear.name] != "float":
            weight = np.concatenate([read_float32(checkpoint, f"{member}.weight") for member in linear.members])
            sqnr = output_sqnr_db(statistics.samples[linear.name], weight, s)
        figures[linear.name] = LinearFigures(
            precision=recipe.linears[linear.name],
            sqnr_db=sqnr,
            amax_before=round(float(amax.max()), 4),
            amax_after=round(float((amax / s).max()), 4),
        )
    return figures
