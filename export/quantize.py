"""The build's stage between calibration text and export: quantize, keep the artifact, write the figures per linear."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.precision_search import Bound
from calibration.precisions.catalog import DEFAULT_CHOICE, ladder
from calibration.quantization import FidelityGoal, Quantization, quantize_model
from calibration.recipe import Recipe
from calibration.rotation import ROTATION
from calibration.search import Effort, WeightRounding
from calibration.smoothing import SmoothingFactors
from calibration.sqnr import LINEAR_FIGURES
from calibration.stored_grids import keep_grids
from calibration.texts import TokenizedText
from calibration.validation_split import holds_out
from calibration.weights import PreparedWeights
from engines.manifest import CACHE_ROTATION, CACHE_TREATMENTS, UNTREATED
from engines.onnxruntime.kernels import Kernels
from export.build_options import Reporter
from quasar.checkpoints import Checkpoint, DecoderSpec
from quasar.checkpoints.skipped_layers import renumbered
from quasar.errors import BuildError
from quasar.files import sha256_json, write_json

# What share of a bound the search aims at, on its own text, build after build until the engine meets the bound itself.
ROOMS = (0.8, 0.6, 0.4, 0.2)


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    texts: Sequence[TokenizedText],
    evaluation: Sequence[TokenizedText],
    folder: Path,
    directory: Path,
    remaining: Sequence[int],
    goal: FidelityGoal | None,
    room: float,
    effort: Effort,
    rounding: WeightRounding | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Leave the quantization in `folder` and its figures in the engine directory; returns what the manifest records.

    The whole model is quantized; the figures are of the `remaining` layers, which the engine has. `evaluation`: texts
    that the float model reads meanwhile. `room`: the share of a gate that is aimed at.
    """
    if not holds_out(texts):
        reporter.stage(
            "",
            f"{len(texts)} calibration texts are too few to hold some out: what is fitted to them is judged by them; "
            "more and shorter ones in --calibration are better",
        )
    quantized = quantize_model(
        checkpoint,
        recipe,
        texts,
        folder,
        reporter.steps,
        others=evaluation,
        goal=goal,
        room=room,
        effort=effort,
        rounding=rounding,
    )
    quantized.quantization.save(folder)
    figures = {name: figure.to_json() for name, figure in quantized.figures.items()}
    write_json(directory / LINEAR_FIGURES, renumbered(figures, remaining))
    return quantized.record


def keep(checkpoint: Checkpoint, recipe: Recipe, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Leave a quantization of the checkpoint's own integers in `folder`; returns what the manifest records."""
    quantized = keep_grids(checkpoint, recipe, folder, reporter.steps)
    quantized.quantization.save(folder)
    return {**quantized.record, "source": "checkpoint"}


def said_of_grids(record: dict[str, Any]) -> str:
    """How many linears are as the checkpoint has them, and what was rounded anew."""

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{count} of {form}" for form, count in counts.items())

    kept, rounded = record["kept"], record["rounded"]
    said = f"{sum(kept.values())} linears on their own grid ({listed(kept)})" if kept else "no linear on its own grid"
    return f"{said}; rounded to 8 bits: {listed(rounded)}" if rounded else said


def passes_gate(recipe: Recipe, fidelity: dict[str, Any]) -> bool:
    """Whether an engine's answers on the evaluation prompts are within the recipe's gate, if it can be finer at all."""
    if recipe.gate is None or recipe.precision != DEFAULT_CHOICE:
        return True
    return bool(fidelity["continuation"]["mean_kl_nats"] <= recipe.gate)


def goal_of(bound: Bound, room: float, spec: DecoderSpec, kernels: "Kernels", reporter: Reporter) -> FidelityGoal:
    """A bound with the latency of linears on this machine."""
    # It imports onnx_ir, which a build that is refused does not wait for.
    from export.linear_latency import measure_linear_latency

    shapes = {(linear.inputs, linear.outputs) for linear in spec.linears()}
    with reporter.steps("latency of linears", len(shapes)) as step:
        latency = measure_linear_latency(spec, kernels, on_shape=step)
    return FidelityGoal(bound=bound.with_room(room), latency=latency)


def prepared_weights(
    checkpoint: Checkpoint, recipe: Recipe, folder: Path | None, remaining: Sequence[int]
) -> PreparedWeights:
    """The tensors of the checkpoint's `remaining` layers, by the quantization in `folder`; None: as they are."""
    if folder is None:
        return PreparedWeights(checkpoint, recipe, SmoothingFactors(), remaining=remaining)
    found = Quantization.load(folder)
    return PreparedWeights(checkpoint, recipe, found.factors, found.integers, found.static_scales, remaining=remaining)


def meets(bound: Bound | None, fidelity: dict[str, Any]) -> bool:
    """Whether an engine's figures on the evaluation prompts are within the bound, if there is one."""
    return bound is None or bound.met(fidelity["mean_kl_nats"], fidelity["top1_agreement"])


def check_bound(bound: Bound | None, fidelity: dict[str, Any], linears: dict[str, str]) -> None:
    """Raise `BuildError` with what was reached if an engine does not meet its bound."""
    kl, top1 = fidelity["mean_kl_nats"], fidelity["top1_agreement"]
    if not meets(bound, fidelity):
        first = ladder()[0]
        raised = sum(precision != first.name for precision in linears.values())
        raise BuildError(
            f"the bound ({bound}) was not met: the best engine reached KL {kl:g}, top-1 {top1:g} on the evaluation "
            f"prompts, with {raised} of {len(linears)} linears above {first.title}; ask for less"
        )


def cache_treatments(folder: Path | None, *, rotates: bool) -> dict[str, str]:
    """What was done to what the KV cache holds (`engines.manifest.CACHE_TREATMENTS`), by the quantization in `folder`.

    Smoothing of v_proj and o_proj, and a rotation of values: nothing is done to keys.
    """
    factors = {} if folder is None else Quantization.load(folder).factors.by_linear
    values = {
        name: np.asarray(factor, np.float32).tobytes().hex()
        for name, factor in sorted(factors.items())
        if name.endswith(".o_proj")
    }
    treatments = dict.fromkeys(CACHE_TREATMENTS, UNTREATED)
    if values:
        treatments["cache_value_smoothing"] = sha256_json(values)
    if rotates:
        treatments[CACHE_ROTATION] = ROTATION
    return treatments
