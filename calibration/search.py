"""How one linear is quantized: smoothing, range and rounding with a small error of its output.

    fixed                    SmoothQuant with one alpha, rounded to nearest: where a search begins
    alpha per group          the alpha (or no smoothing) with the smallest error; clipping where that helps
    refined factors          learned smoothing (`calibration.learned_smoothing`); the range of static activations
    reconstructed rounding   GPTQ (`calibration.gptq`)

Whether a step is worth its time, and whether it is kept, is decided block by block (`calibration.block_search`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from calibration.clipping import clip_weights, static_range
from calibration.fake_quantization import FakeQuantizedLinear
from calibration.gptq import corrections_of, gptq_round
from calibration.learned_smoothing import learn_factor
from calibration.output_error import LinearSample
from calibration.precisions.base import Precision
from calibration.precisions.catalog import precision_of
from calibration.quantized_model import LinearChoice
from calibration.recipe import Recipe
from calibration.smoothing import group_factor, takes_factor, tie_of
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import Linear
from quasar.numerics import apply_scale, static_scale_of

if TYPE_CHECKING:
    import torch

FIRST_ALPHA = 0.5
# That tell whether a factor helps at another precision.
_FEW_TOKENS = 128
# Of each half that judges an alpha.
_JUDGING_TOKENS = 256
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Effort = Literal["quick", "normal", "thorough"]
# What a search tries after its first alpha, each upon the ones before it, by the bits of weights.
_STEPS: Mapping[int, Mapping[Effort, tuple[str, ...]]] = {
    8: {
        "quick": (),
        "normal": ("refined factors",),
        "thorough": ("alpha per group", "refined factors", "reconstructed rounding"),
    },
    4: {
        "quick": ("reconstructed rounding",),
        "normal": ("alpha per group", "reconstructed rounding"),
        "thorough": ("alpha per group", "reconstructed rounding"),
    },
}
# How weights are rounded, by the names of the field, where a user asks for one: to nearest; GPTQ (arXiv 2210.17323);
# scales of inputs found by a search over the error of a linear's output, with clipping, as in AWQ (arXiv 2306.00978).
WeightRounding = Literal["rtn", "gptq", "awq"]
_STEPS_OF_ROUNDING: Mapping[WeightRounding, tuple[str, ...]] = {
    "rtn": (),
    "gptq": ("reconstructed rounding",),
    "awq": ("alpha per group",),
}


def steps_of(precision: Precision, effort: Effort, rounding: WeightRounding | None = None) -> tuple[str, ...]:
    """What a search tries for linears of a precision; `rounding`: what was asked for in its place."""
    return _STEPS[precision.weight_bits][effort] if rounding is None else _STEPS_OF_ROUNDING[rounding]


@dataclass(frozen=True, slots=True)
class Trial:
    """How to quantize one linear: its choice, smoothing factor float32 [inputs], clipping float32 [outputs, scales]."""

    choice: LinearChoice
    factor: "torch.Tensor | None"
    clip: "torch.Tensor | None" = None


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """A trial and its integers: `values` int8 [outputs, inputs], `scale` float32 [outputs, scales]."""

    trial: Trial
    values: "torch.Tensor"
    scale: "torch.Tensor"

    def form(self, outputs: slice = slice(None)) -> FakeQuantizedLinear:
        """The linear, or some of its outputs, as the verifier would compute it."""
        choice, values, scale = self.trial.choice, self.values[outputs], self.scale[outputs]
        return FakeQuantizedLinear(
            precision=precision_of(choice.precision),
            weight=lambda rows: apply_scale(values[rows].float(), scale[rows]),
            num_outputs=len(values),
            factor=self.trial.factor,
            static_scale=choice.static_scale,
        )


class LinearSearch:
    """Chooses how to quantize single linears of a decoder, by a recipe."""

    def __init__(self, spec: DecoderSpec, recipe: Recipe) -> None:
        self._spec = spec
        self._recipe = recipe

    def begin(self, linear: Linear, sample: LinearSample) -> Trial:
        """With the recipe's alpha, or the first one of a search."""
        alpha = self._recipe.alpha
        return self.fixed(linear, sample, FIRST_ALPHA if alpha == "auto" else None if isinstance(alpha, str) else alpha)

    def fixed(self, linear: Linear, sample: LinearSample, alpha: float | None) -> Trial:
        """One alpha (None: no smoothing), no clipping, rounded to nearest."""
        if not takes_factor(self._spec, linear.name):
            alpha = None
        factor = self._factor(linear, sample, alpha)
        choice = LinearChoice(
            precision=self._recipe.linears[linear.name], alpha=alpha, smoothing="off" if alpha is None else "alpha"
        )
        if precision_of(choice.precision).has_static_scale:
            choice = replace(choice, static_scale=static_scale_of(_largest(sample, factor)))
        return Trial(choice, factor)

    def step(self, name: str, base: Trial, linear: Linear, sample: LinearSample) -> Trial:
        """What a step makes of a trial."""
        match name:
            case "alpha per group":
                return self._best_alpha(linear, sample)
            case "refined factors":
                return self._learned_smoothing(base, linear, sample)
            case "reconstructed rounding":
                return _gptq(base, sample)
            case _:
                raise ValueError(f"the step {name!r} is not known")

    def at_precision(self, precision: Precision, base: Trial, sample: LinearSample) -> Trial:
        """A trial at another precision, with or without its factor, whichever loses less."""
        factor, thin = base.factor, sample.thinned(_FEW_TOKENS)
        choice = replace(base.choice, precision=precision.name, range="max", rounding="nearest", static_scale=0.0)
        if factor is not None and thin.error(precision, None) < thin.error(precision, factor):
            choice, factor = replace(choice, alpha=None, smoothing="off"), None
        return Trial(choice, factor)

    def _best_alpha(self, linear: Linear, sample: LinearSample) -> Trial:
        precision = precision_of(self._recipe.linears[linear.name])
        alphas = (None, *(_ALPHAS if takes_factor(self._spec, linear.name) else ()))
        weight_amax, parts = sample.weight_amax(), list(sample.crossed(_JUDGING_TOKENS))
        # Judged by text that the factor has not seen: a large alpha makes a small factor of a channel that happened to
        # be silent, and the token that fires it is rounded with that channel's step.
        errors = {
            alpha: sum(
                judging.error(precision, self._factor_of(linear, amax, weight_amax, alpha)) for amax, judging in parts
            )
            for alpha in alphas
        }
        trial = self.fixed(linear, sample, min(errors, key=lambda one: errors[one]))
        return self._with_clipping(sample, trial.choice, trial.factor)

    def _learned_smoothing(self, base: Trial, linear: Linear, sample: LinearSample) -> Trial:
        choice, factor = base.choice, base.factor
        precision = precision_of(choice.precision)
        if precision.has_static_scale:
            return self._with_clipping(sample, choice, factor)
        if not (precision.learns_factors and takes_factor(self._spec, linear.name)):
            return base
        import torch

        thin = sample.thinned()
        start = torch.ones(linear.inputs) if factor is None else factor
        learned = learn_factor(start, thin.x, thin.weight, thin.token_weights, tie_of(self._spec, linear.name))
        return Trial(replace(choice, smoothing="refined", range="max"), learned)

    def _with_clipping(self, sample: LinearSample, choice: LinearChoice, factor: "torch.Tensor | None") -> Trial:
        precision = precision_of(choice.precision)
        if precision.has_static_scale:
            scale, name = static_range(sample.thinned(), factor, precision, _largest(sample, factor))
            return Trial(replace(choice, range=name, static_scale=scale), factor)
        if not precision.clips_weights:
            return Trial(choice, factor)
        thin = sample.thinned()
        clip = clip_weights(thin, factor, precision)
        if thin.error(precision, factor, clip=clip) < thin.error(precision, factor):
            return Trial(replace(choice, range="clipped"), factor, _clip_parts(sample, factor, precision))
        return Trial(replace(choice, range="max"), factor)

    def _factor(self, linear: Linear, sample: LinearSample, alpha: float | None) -> "torch.Tensor | None":
        return None if alpha is None else self._factor_of(linear, sample.amax, sample.weight_amax(), alpha)

    def _factor_of(
        self, linear: Linear, amax: "torch.Tensor", weight_amax: "torch.Tensor", alpha: float | None
    ) -> "torch.Tensor | None":
        import torch

        if alpha is None:
            return None
        return torch.from_numpy(group_factor(self._spec, linear.name, amax.numpy(), weight_amax.numpy(), alpha)).float()


def quantize_linear(sample: LinearSample, trial: Trial) -> RoundedLinear:
    """The integers of a linear, rows at a time."""
    import torch

    precision = precision_of(trial.choice.precision)
    x = sample.x if trial.factor is None else sample.x / trial.factor
    values = torch.empty(sample.weight.shape, dtype=torch.int8)
    scales: list[torch.Tensor] = []
    corrections = corrections_of(x) if trial.choice.rounding == "reconstructed" else None
    for rows, part in sample.parts():
        weight = part.weight if trial.factor is None else part.weight * trial.factor
        scale = precision.scales_of(weight)
        if trial.clip is not None:
            scale = precision.stored_scales(scale * trial.clip[rows])
        if corrections is not None:
            values[rows] = gptq_round(weight, scale, corrections, precision)
        else:
            values[rows] = precision.round_weight(weight, scale).to(torch.int8)
        scales.append(scale)
    return RoundedLinear(trial, values, torch.cat(scales))


def _gptq(base: Trial, sample: LinearSample) -> Trial:
    precision = precision_of(base.choice.precision)
    clip = _clip_parts(sample, base.factor, precision) if base.choice.range == "clipped" else None
    return Trial(replace(base.choice, rounding="reconstructed"), base.factor, clip)


def _clip_parts(sample: LinearSample, factor: "torch.Tensor | None", precision: Precision) -> "torch.Tensor":
    import torch

    return torch.cat([clip_weights(part, factor, precision) for _, part in sample.parts()])


def _largest(sample: LinearSample, factor: "torch.Tensor | None") -> float:
    return float((sample.amax if factor is None else sample.amax / factor).max())
