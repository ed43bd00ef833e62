"""From calibration text to a quantized model: statistics, search, and the artifact that the export reads."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.precision_search import Bound, LinearLatency, raise_precisions
from calibration.precisions.catalog import FLOAT
from calibration.quantized_folder import QuantizedFolder
from calibration.quantized_model import LinearChoice, QuantizedModel
from calibration.recipe import Recipe
from calibration.search import Progress, Search
from calibration.smoothing import SmoothingFactors
from calibration.sqnr import LinearFigures, linear_figures
from calibration.statistics import ActivationStatistics, collect_statistics
from calibration.texts import TokenizedText
from calibration.validation_split import ValidationSplit, split_validation
from quasar.checkpoints import DecoderSpec
from quasar.files import atomic_path, write_json
from quasar.numerics import QuantizedWeight

if TYPE_CHECKING:
    import torch

_CHOICES, _FACTORS = "choices.json", "factors.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What was decided for every linear, in graph order, and where its integers are."""

    choices: dict[str, LinearChoice]
    factors: SmoothingFactors
    folders: Mapping[str, QuantizedFolder]

    def recipe(self, asked: Recipe) -> Recipe:
        """The recipe with the precisions that were decided on."""
        return replace(asked, linears={name: choice.precision for name, choice in self.choices.items()})

    def integers(self, linear: str) -> QuantizedWeight | None:
        """A linear's integers; None if it stays float."""
        folder = self.folders.get(linear)
        return None if folder is None else folder.read(linear)

    @property
    def static_scales(self) -> dict[str, float]:
        """Of the activations of linears that have one scale for all of them; 0 of others."""
        return {name: choice.static_scale for name, choice in self.choices.items()}

    def save(self, folder: Path) -> None:
        """Write it, all but the integers, which are there already."""
        from safetensors.numpy import save_file

        factors = {name: np.asarray(factor, np.float32) for name, factor in self.factors.by_linear.items()}
        with atomic_path(folder / _FACTORS) as temporary:
            save_file(factors, temporary)
        entries = {
            name: {
                "choice": choice.to_json(),
                "folder": str(self.folders[name].path.relative_to(folder)) if name in self.folders else "",
            }
            for name, choice in self.choices.items()
        }
        write_json(folder / _CHOICES, entries)

    @classmethod
    def load(cls, folder: Path) -> "Quantization":
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        entries = json.loads((folder / _CHOICES).read_text(encoding="utf-8"))
        return cls(
            choices={name: LinearChoice(**entry["choice"]) for name, entry in entries.items()},
            factors=SmoothingFactors(by_linear=load_file(folder / _FACTORS)),
            folders={
                name: QuantizedFolder(folder / entry["folder"]) for name, entry in entries.items() if entry["folder"]
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityGoal:
    """What precision "auto" aims at, and the latency of linears on this machine."""

    bound: Bound
    latency: LinearLatency


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A quantization, figures by linear, and what the manifest records of the search."""

    quantization: Quantization
    figures: dict[str, LinearFigures]
    record: dict[str, Any]


def quantize_model(
    model: "torch.nn.Module",
    spec: DecoderSpec,
    recipe: Recipe,
    texts: Sequence[TokenizedText],
    folder: Path,
    progress: Progress,
    goal: FidelityGoal | None = None,
) -> Quantized:
    """Quantize a float model by a recipe; integers go below `folder`.

    With alpha "auto", or a goal of precision "auto", a quarter of the texts is the validation split: nothing is fitted
    to it, and steps are judged on it.
    """
    searches = recipe.alpha == "auto" or goal is not None
    fitted, held_out = split_validation(texts) if searches else (list(texts), [])
    with progress("statistics", len(fitted)) as step:
        statistics = collect_statistics(model, spec, [text.tokens for text in fitted], on_batch=step)
    search = Search(model, spec, recipe, statistics, folder, progress)
    record: dict[str, Any] = {"alpha": recipe.alpha, "tokens": statistics.num_tokens}
    if searches:
        validation = ValidationSplit(model, held_out, spec.vocab_size)
        best, trace = search.run(validation)
        if goal is not None:
            best, steps = raise_precisions(search, best, validation, goal.latency, goal.bound, spec, model, progress)
            trace += steps
        record["search"] = {
            "held_back_tokens": validation.num_tokens,
            "steps": [step.to_json() for step in trace],
        }
    else:
        best, _ = search.run(None)
    figures = _figures(search, best, recipe, spec, statistics, progress)
    quantization = Quantization(
        choices={name: figure.choice for name, figure in figures.items()},
        factors=best.smoothing_factors(),
        folders=best.folders,
    )
    return Quantized(quantization=quantization, figures=figures, record=record)


def _figures(
    search: Search,
    best: QuantizedModel,
    recipe: Recipe,
    spec: DecoderSpec,
    statistics: ActivationStatistics,
    progress: Callable[..., Any],
) -> dict[str, LinearFigures]:
    import torch

    quantized, figures = best.fake_quantized_linears(), {}
    with progress("figures", len(recipe.linears)) as step:
        for linear in spec.linears():
            sample, amax = search.sample(linear).fewer_tokens(), torch.from_numpy(statistics.amax[linear.name])
            choice = best.choices.get(linear.name, LinearChoice(precision=FLOAT.name))
            figures[linear.name] = linear_figures(sample, choice, quantized.get(linear.name), amax)
            step(1)
    return figures
