"""A quantized model: what was chosen for each linear, and the integers that follow."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from calibration.fake_quantization import FakeQuantizedLinear
from calibration.precisions.catalog import FLOAT, precision_of
from calibration.quantized_folder import QuantizedFolder
from calibration.smoothing import SmoothingFactors
from quasar.numerics import apply_scale

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChoice:
    """How one linear is quantized.

    `precision`: its name. `alpha`: SmoothQuant's, None without smoothing. `smoothing`: "refined" is learned smoothing.
    `range`: "max", "clipped" (weights, channel by channel), or a percentile of static activations. `rounding`:
    "reconstructed" is GPTQ, "stored" are the checkpoint's own integers. `static_scale`: of static activations, else 0.
    """

    precision: str
    alpha: float | None = None
    smoothing: Literal["off", "alpha", "refined"] = "off"
    range: str = "max"
    rounding: Literal["nearest", "reconstructed", "stored"] = "nearest"
    static_scale: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures' entry."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """Choices and factors by linear name; integers in a folder. Float linears have no integers and no factor."""

    name: str
    choices: Mapping[str, LinearChoice]
    factors: "Mapping[str, torch.Tensor | None]"
    folders: Mapping[str, QuantizedFolder]

    def fake_quantized_linears(self) -> dict[str, FakeQuantizedLinear]:
        """The quantized linears by name, as `fake_quantization.fake_quantized` takes them."""
        return {
            name: FakeQuantizedLinear(
                precision=precision_of(choice.precision),
                weight=partial(self._weight, name),
                num_outputs=self.folders[name].num_outputs(name),
                factor=self.factors[name],
                static_scale=choice.static_scale,
            )
            for name, choice in self.choices.items()
            if name in self.folders
        }

    def with_precisions(
        self, precisions: Mapping[str, str], raised: Mapping[str, "QuantizedModel"]
    ) -> "QuantizedModel":
        """This one, with linears of `raised` (by precision) where `precisions` asks for them; others float."""
        sources = {
            name: raised.get(precision, self) for name, precision in precisions.items() if precision != FLOAT.name
        }
        return QuantizedModel(
            name="mixed",
            choices={
                name: sources[name].choices[name] if name in sources else LinearChoice(precision=FLOAT.name)
                for name in precisions
            },
            factors={name: sources[name].factors[name] if name in sources else None for name in precisions},
            folders={name: source.folders[name] for name, source in sources.items()},
        )

    def smoothing_factors(self) -> SmoothingFactors:
        """The factors in numpy, as the export folds them."""
        return SmoothingFactors(
            by_linear={name: factor.numpy() for name, factor in self.factors.items() if factor is not None}
        )

    def _weight(self, name: str, rows: slice) -> "torch.Tensor":
        values, scale = self.folders[name].load(name)
        return apply_scale(values[rows].float(), scale[rows])
