"""How much each linear loses by quantization, on a sample of its own inputs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import FakeQuantizedLinear
from calibration.output_error import LinearSample
from calibration.precisions.catalog import FLOAT
from calibration.quantized_model import LinearChoice
from calibration.search import RoundedLinear

if TYPE_CHECKING:
    import torch

# The file of an engine directory that holds the figures.
LINEAR_FIGURES = "calibration.json"
_MOST_TOKENS = 128


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

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "LinearFigures":
        """What `to_json` gave."""
        own = {name: entry[name] for name in ("sqnr_db", "amax_before", "amax_after")}
        choice = LinearChoice(**{name: value for name, value in entry.items() if name not in own})
        return cls(choice=choice, **own)


def linear_figures(sample: LinearSample, quantized: RoundedLinear) -> LinearFigures:
    """The figures of a quantized linear, on a part of its sample."""
    factor = quantized.trial.factor
    return LinearFigures(
        choice=quantized.trial.choice,
        sqnr_db=output_sqnr_db(sample.thinned(_MOST_TOKENS), quantized.form(sample.thin_outputs)),
        amax_before=round(float(sample.amax.max()), 4),
        amax_after=round(float((sample.amax if factor is None else sample.amax / factor).max()), 4),
    )


def float_figures(amax: "torch.Tensor") -> LinearFigures:
    """Of a linear that stays float; `amax` float32 [inputs]: of its input over the calibration text."""
    largest = round(float(amax.max()), 4)
    return LinearFigures(
        choice=LinearChoice(precision=FLOAT.name), sqnr_db=None, amax_before=largest, amax_after=largest
    )


def output_sqnr_db(sample: LinearSample, quantized: FakeQuantizedLinear) -> float:
    """10 log10(Σ y² / Σ (y - ŷ)²) of y = x Wᵀ against its quantized form ŷ, over a sample of inputs."""
    exact = sample.x @ sample.weight.t()
    noise = float((exact - quantized.product(sample.x)).double().square().sum())
    signal = float(exact.double().square().sum())
    return round(10 * log10(max(signal, 1e-30) / max(noise, 1e-30)), 2)


def read_linear_figures(directory: Path) -> dict[str, dict[str, Any]]:
    """The figures per linear that the build kept; {} for an engine without INT8 linears."""
    path = directory / LINEAR_FIGURES
    if not path.is_file():
        return {}
    figures: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return figures
