"""A checkpoint that is already quantized, taken as it is: no calibration, no second rounding where a grid is kept."""

from collections import Counter
from pathlib import Path

import numpy as np

from calibration.block_search import Progress
from calibration.precisions.base import Precision
from calibration.precisions.catalog import FLOAT, holders, precision_of
from calibration.quantization import Quantization, Quantized
from calibration.quantized_folder import QuantizedFolder
from calibration.quantized_model import LinearChoice
from calibration.recipe import Recipe
from calibration.smoothing import SmoothingFactors
from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint import prequantized_linear, read_float32
from quasar.checkpoints.prequantized.weight import PrequantizedWeight, stacked
from quasar.checkpoints.spec import Linear
from quasar.numerics import Float32, QuantizedWeight

_FLOATS = "floats"


def keep_grids(checkpoint: Checkpoint, recipe: Recipe, folder: Path, progress: Progress) -> Quantized:
    """Every linear with the coarsest precision that holds all of its stored weights; integers go to `folder`.

    Where none does, and where weights are floats, they are rounded to nearest in 8 bits. Linears that the recipe keeps
    float stay so. The record counts linears by what they were stored as: "kept" and "rounded".
    """
    stored_folder = QuantizedFolder(folder / "stored")
    choices: dict[str, LinearChoice] = {}
    kept: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    linears = list(checkpoint.spec.linears())
    with progress("stored weights", len(linears)) as step:
        for linear in linears:
            choices[linear.name] = LinearChoice(precision=FLOAT.name)
            if recipe.is_quantized(linear.name):
                stored = stored_weight(checkpoint, linear)
                found = _kept(stored, recipe.precision)
                (rounded if found is None else kept)[_FLOATS if stored is None else stored.form] += 1
                precision, weight = found or _rounded(checkpoint, linear, precision_of(recipe.linears[linear.name]))
                stored_folder.save_weight(linear.name, weight)
                choices[linear.name] = LinearChoice(
                    precision=precision.name, rounding="nearest" if found is None else "stored"
                )
            step(1)
    quantization = Quantization(
        choices=choices,
        factors=SmoothingFactors(),
        folders={name: stored_folder for name, choice in choices.items() if choice.precision != FLOAT.name},
    )
    return Quantized(quantization=quantization, figures={}, record={"kept": dict(kept), "rounded": dict(rounded)})


def stored_weight(checkpoint: Checkpoint, linear: Linear) -> PrequantizedWeight | None:
    """A linear's members one below the other; None where one of them is stored as floats, or on no grid."""
    members = [prequantized_linear(checkpoint, member) for member in linear.members]
    found = [member for member in members if member is not None]
    return stacked(found) if len(found) == len(members) else None


def _kept(stored: PrequantizedWeight | None, choice: str) -> tuple[Precision, QuantizedWeight] | None:
    if stored is None:
        return None
    for precision in holders(choice):
        if (weight := precision.held(stored)) is not None:
            return precision, weight
    return None


def _rounded(checkpoint: Checkpoint, linear: Linear, precision: Precision) -> tuple[Precision, QuantizedWeight]:
    floats: Float32 = np.concatenate([read_float32(checkpoint, f"{member}.weight") for member in linear.members])
    weight = precision.quantize(floats)
    assert isinstance(weight, QuantizedWeight)
    return precision, weight
