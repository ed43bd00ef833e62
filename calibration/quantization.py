"""From calibration text to a quantized model: statistics, search, and the artifact that the export reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.block_search import FITTED, HELD_OUT, OTHERS, BlockSearch, Progress
from calibration.float_blocks import FloatBlocks
from calibration.float_model import load_float_model
from calibration.precision_search import Bound, LinearLatency, raise_precisions
from calibration.precisions.base import Precision
from calibration.precisions.catalog import FLOAT, PRECISIONS, precisions_for, rungs_above
from calibration.quantized_folder import QuantizedFolder
from calibration.quantized_model import LinearChoice
from calibration.recipe import Recipe
from calibration.search import Effort, WeightRounding, steps_of
from calibration.smoothing import SmoothingFactors
from calibration.sqnr import LinearFigures
from calibration.texts import TokenizedText
from calibration.validation_split import Divergence, ValidationSplit, holds_out, split_validation
from quasar.checkpoints import Checkpoint
from quasar.files import atomic_path, safetensors_errors, write_json
from quasar.numerics import QuantizedWeight

_CHOICES, _FACTORS = "choices.json", "factors.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What was decided for every linear, in graph order, and where its integers are."""

    choices: dict[str, LinearChoice]
    factors: SmoothingFactors
    folders: Mapping[str, QuantizedFolder]

    def recipe(self, asked: Recipe) -> Recipe:
        """The recipe with the precisions that were decided on."""
        linears = {name: choice.precision for name, choice in self.choices.items()}
        if asked.gate is None:
            return replace(asked, linears=linears)
        # The finest of those that a gate decides between; linears that cannot have it keep the other.
        found = [
            precision for name, precision in PRECISIONS.items() if name in linears.values() if precision is not FLOAT
        ]
        return replace(asked, linears=linears, precision=found[-1].choice if found else asked.precision)

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
        with safetensors_errors(), atomic_path(folder / _FACTORS) as temporary:
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
    checkpoint: Checkpoint,
    recipe: Recipe,
    texts: Sequence[TokenizedText],
    folder: Path,
    progress: Progress,
    *,
    others: Sequence[TokenizedText] = (),
    goal: FidelityGoal | None = None,
    room: float = 1.0,
    effort: Effort = "normal",
    rounding: WeightRounding | None = None,
) -> Quantized:
    """Quantize a checkpoint by a recipe; integers go below `folder`, where an interrupted run goes on.

    With alpha "auto", a gate, or a goal of precision "auto", a quarter of the texts is the validation split: nothing is
    fitted to it, and it judges what was. The float model reads `others` as well, for `calibration.float_reference`.
    """
    blocks = FloatBlocks(checkpoint)
    searches = recipe.alpha == "auto" or recipe.gate is not None or goal is not None
    fitted, held_out = split_validation(texts) if searches else (list(texts), [])
    search = BlockSearch(
        blocks,
        recipe,
        {FITTED: fitted, HELD_OUT: held_out, OTHERS: others},
        folder,
        progress,
        alternatives=_alternatives(recipe, goal),
        steps=steps_of(precisions_for(recipe.precision)[0], effort, rounding),
    )
    walked = search.run()
    del search, blocks
    chosen = next(iter(walked.models))
    record: dict[str, Any] = {"alpha": recipe.alpha, "effort": effort, "tokens": walked.num_tokens}
    if rounding is not None:
        record["weights"] = rounding
    if searches:
        record["search"] = {
            "held_back_tokens": walked.held_out_tokens if holds_out(texts) else 0,
            "steps": walked.trace,
            "precisions": {
                name: {key: round(value, 6) for key, value in divergence.to_json().items()}
                for name, divergence in walked.divergences.items()
            },
        }
    if recipe.gate is not None:
        chosen = _through_gate(room * recipe.gate, walked.divergences)
        of_text = "held-out text" if holds_out(texts) else "fitted text"
        judged_on = of_text if room else "evaluation prompts"
        record["gate"] = {"max_answers_kl": recipe.gate, "judged_on": judged_on, "precision": chosen}
    best, figures = walked.models[chosen], dict(walked.figures[chosen])
    if goal is not None:
        model = load_float_model(checkpoint)
        validation = ValidationSplit(model, checkpoint.spec, held_out)
        best, steps = raise_precisions(
            walked.models, validation, goal.latency, goal.bound, checkpoint.spec, model, progress
        )
        record["search"]["raised"] = [step.to_json() for step in steps]
        for name, choice in best.choices.items():
            own = walked.figures.get(choice.precision, {}).get(name)
            figures[name] = own or replace(figures[name], choice=choice, sqnr_db=None)
    names = [linear.name for linear in checkpoint.spec.linears()]
    quantization = Quantization(
        choices={name: best.choices[name] for name in names},
        factors=best.smoothing_factors(),
        folders=best.folders,
    )
    return Quantized(quantization=quantization, figures={name: figures[name] for name in names}, record=record)


def _alternatives(recipe: Recipe, goal: FidelityGoal | None) -> list[Precision]:
    """What linears are quantized to beside the recipe's precision: all rungs above it, or the next one for a gate."""
    if goal is None and recipe.gate is None:
        return []
    rungs = list(rungs_above(precisions_for(recipe.precision)[0]))
    return rungs if goal is not None else rungs[:1]


def _through_gate(gate: float, divergences: Mapping[str, Divergence]) -> str:
    """The first precision near enough to the float model, by all positions and by answers, else the last one."""
    kls = {name: max(found.kl, found.answers_kl) for name, found in divergences.items()}
    return next((name for name, kl in kls.items() if kl <= gate), list(kls)[-1])
