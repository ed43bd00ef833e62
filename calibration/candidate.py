"""A whole model's quantization: what was chosen for each linear, and the integers that follow."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from calibration.quantized_folder import QuantizedFolder
from calibration.recipe import LinearPrecision
from calibration.simulation import SimulatedLinear, apply_scale
from calibration.smoothing import SmoothingFactors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChoice:
    """How one linear is quantized.

    `alpha`: SmoothQuant's, None without smoothing; `smoothing` "refined": from there, channel by channel.
    `range`: "max", "clipped" (weights, row by row), or of w8a8-static's activations a percentile.
    `static_scale`: theirs, else 0.
    """

    precision: LinearPrecision
    alpha: float | None = None
    smoothing: Literal["off", "alpha", "refined"] = "off"
    range: str = "max"
    rounding: Literal["nearest", "reconstructed"] = "nearest"
    static_scale: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures' entry."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Choices and factors by linear name; integers in a folder. Float linears have no integers and no factor."""

    name: str
    choices: Mapping[str, LinearChoice]
    factors: "Mapping[str, torch.Tensor | None]"
    folders: Mapping[str, QuantizedFolder]

    def simulated(self) -> dict[str, SimulatedLinear]:
        """What `simulation.simulated` takes."""
        return {
            name: SimulatedLinear(
                precision=choice.precision,
                weight=partial(self._weight, name),
                factor=self.factors[name],
                static_scale=choice.static_scale,
            )
            for name, choice in self.choices.items()
        }

    def with_precisions(self, precisions: Mapping[str, LinearPrecision], blocks: "Candidate") -> "Candidate":
        """This one, with linears of `blocks` where those are asked for, and others float."""
        named = {name: blocks if precision == "w8a8-block" else self for name, precision in precisions.items()}
        return Candidate(
            name="mixed",
            choices={
                name: LinearChoice(precision="float") if precisions[name] == "float" else source.choices[name]
                for name, source in named.items()
            },
            factors={
                name: None if precisions[name] == "float" else source.factors[name] for name, source in named.items()
            },
            folders={name: source.folders[name] for name, source in named.items() if precisions[name] != "float"},
        )

    def smoothing_factors(self) -> SmoothingFactors:
        """The factors in numpy, as the export folds them."""
        return SmoothingFactors(
            by_linear={name: factor.numpy() for name, factor in self.factors.items() if factor is not None}
        )

    def _weight(self, name: str) -> "torch.Tensor":
        return apply_scale(*self.folders[name].load(name))
