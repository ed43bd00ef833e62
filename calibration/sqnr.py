"""How much each linear loses by quantization, on a sample of its own inputs."""

import json
from dataclasses import asdict, dataclass
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import FakeQuantizedLinear
from calibration.output_error import LinearSample
from calibration.quantized_model import LinearChoice

if TYPE_CHECKING:
    import torch

# The file of an engine directory that holds the figures.
LINEAR_FIGURES = "calibration.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFigures:
    """One linear: how it is quantized, SQNR of its output in dB (None: float), amax of its input before and after.

    After is after smoothing.
    """

    choice: LinearChoice
    sqnr_db: float | None
    amax_before: float
    amax_after: float

    def to_json(self) -> dict[str, Any]:
        """The report's entry."""
        figures = asdict(self)
        return {**figures.pop("choice"), **figures}


def output_sqnr_db(sample: LinearSample, quantized: FakeQuantizedLinear) -> float:
    """10 log10(Σ y² / Σ (y - ŷ)²) of y = x Wᵀ against its quantized form ŷ, over a sample of inputs."""
    exact = sample.x @ sample.weight.t()
    noise = float((exact - quantized.product(sample.x)).double().square().sum())
    signal = float(exact.double().square().sum())
    return round(10 * log10(max(signal, 1e-30) / max(noise, 1e-30)), 2)


def linear_figures(
    sample: LinearSample, choice: LinearChoice, quantized: FakeQuantizedLinear | None, amax: "torch.Tensor"
) -> LinearFigures:
    """The figures of one linear; `quantized` is None if it stays float.

    `amax` float32 [inputs]: of its input over the calibration text.
    """
    after = amax if quantized is None or quantized.factor is None else amax / quantized.factor
    return LinearFigures(
        choice=choice,
        sqnr_db=None if quantized is None else output_sqnr_db(sample, quantized),
        amax_before=round(float(amax.max()), 4),
        amax_after=round(float(after.max()), 4),
    )


def read_linear_figures(directory: Path) -> dict[str, dict[str, Any]]:
    """The figures per linear that the build kept; {} for an engine without INT8 linears."""
    path = directory / LINEAR_FIGURES
    if not path.is_file():
        return {}
    figures: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return figures
