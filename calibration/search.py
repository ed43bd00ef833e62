"""The search for the quantized model nearest to the float one: smoothing, clipping and rounding, linear by linear.

Each step starts from the best quantized model so far and picks, for every linear, what has the smallest output error.
A step is kept only if it lowers the KL divergence from the float model on the validation split:

    alpha 0.5                SmoothQuant as published, rounded to nearest: where the search begins
    alpha per group          the alpha (or no smoothing) with the smallest error; clipping where that helps
    refined factors          learned smoothing (`calibration.learned_smoothing`)
    reconstructed rounding   GPTQ (`calibration.gptq`)
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.clipping import clip_rows, static_range
from calibration.fake_quantization import fake_quantized, module_of
from calibration.gptq import gptq_round
from calibration.learned_smoothing import learn_factor
from calibration.output_error import LinearSample
from calibration.precisions.base import Precision
from calibration.precisions.catalog import precision_of
from calibration.quantized_folder import QuantizedFolder
from calibration.quantized_model import LinearChoice, QuantizedModel
from calibration.recipe import Recipe
from calibration.smoothing import group_factor, takes_factor, tie_of
from calibration.statistics import ActivationStatistics
from calibration.validation_split import Divergence, ValidationSplit
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import Linear
from quasar.numerics import static_scale_of

if TYPE_CHECKING:
    import torch

FIRST_ALPHA = 0.5
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = ("alpha per group", "refined factors", "reconstructed rounding")

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """What a step of the search reached on the validation split, and whether it was kept."""

    step: str
    kl: float
    top1: float
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {"step": self.step, "kl": round(self.kl, 6), "top1": round(self.top1, 4), "kept": self.kept}


@dataclass(frozen=True, slots=True)
class _Trial:
    """How to quantize one linear: its choice, smoothing factor and clipping."""

    choice: LinearChoice
    factor: "torch.Tensor | None"
    clip: "torch.Tensor | None" = None


_Choose = Callable[[Linear, LinearSample], _Trial]


class Search:
    """Quantizes a model by a recipe; integers are written below `scratch`, a folder for each step."""

    def __init__(
        self,
        model: "torch.nn.Module",
        spec: DecoderSpec,
        recipe: Recipe,
        statistics: ActivationStatistics,
        scratch: Path,
        progress: Progress,
        *,
        clip_weights: bool = True,
    ) -> None:
        self._model = model
        self._spec = spec
        self._recipe = recipe
        self._statistics = statistics
        self._scratch = scratch
        self._progress = progress
        self._clip_weights = clip_weights

    def _begin(self, alpha: float | None) -> QuantizedModel:
        """One alpha for every linear (None: no smoothing), no clipping, rounded to nearest."""
        return self._quantized_model(
            "no smoothing" if alpha is None else f"alpha {alpha:g}", partial(self._fixed, alpha)
        )

    def run(
        self, validation: ValidationSplit | None, steps: Sequence[str] = STEPS
    ) -> tuple[QuantizedModel, list[StepFigures]]:
        """The best quantized model, and what each step reached. A fixed alpha is taken as it is.

        `validation`: where steps are judged; with a fixed alpha it may be None.
        """
        alpha = self._recipe.alpha
        best = self._begin(FIRST_ALPHA if alpha == "auto" else None if isinstance(alpha, str) else alpha)
        if validation is None:
            return best, []
        least = self.measure(best, validation)
        trace = [StepFigures(step=best.name, kl=least.kl, top1=least.top1, kept=True)]
        chosen = {
            "alpha per group": self._best_alpha,
            "refined factors": self._learned_smoothing,
            "reconstructed rounding": self._gptq,
        }
        for step in steps if alpha == "auto" else ():
            trial = self._quantized_model(step, partial(chosen[step], best))
            reached = self.measure(trial, validation)
            trace.append(StepFigures(step=step, kl=reached.kl, top1=reached.top1, kept=(kept := reached.kl < least.kl)))
            if kept:
                best, least = trial, reached
        return best, trace

    def measure(self, quantized: QuantizedModel, validation: ValidationSplit) -> Divergence:
        """The quantized model's divergence from the float model."""
        with fake_quantized(self._model, self._spec, quantized.fake_quantized_linears()):
            return validation.measure()

    def raised(self, base: QuantizedModel, precision: Precision, linears: Collection[str]) -> QuantizedModel:
        """`base` with some linears at another precision, with or without its factors, whichever loses less."""

        def choose(linear: Linear, sample: LinearSample) -> _Trial:
            factor, thin = base.factors[linear.name], sample.thinned()
            choice = replace(base.choices[linear.name], precision=precision.name, range="max", static_scale=0.0)
            if factor is not None and thin.error(precision, None) < thin.error(precision, factor):
                choice, factor = replace(choice, alpha=None, smoothing="off"), None
            return _Trial(choice, factor)

        return self._quantized_model(precision.label, choose, only=set(linears), base=base)

    def sample(self, linear: Linear) -> LinearSample:
        """The linear's weight, and inputs that calibration saw."""
        import torch

        members = [module_of(self._model, member).weight.detach() for member in linear.members]
        return LinearSample(
            x=torch.from_numpy(self._statistics.samples[linear.name]).float(),
            weight=torch.cat(members).float(),
            token_weights=torch.from_numpy(self._statistics.weights_of_tokens(linear.name)),
        )

    def _quantized_model(
        self, name: str, choose: _Choose, only: set[str] | None = None, base: QuantizedModel | None = None
    ) -> QuantizedModel:
        folder = QuantizedFolder(self._scratch / name.replace(" ", "-"))
        choices = dict(base.choices) if base else {}
        factors = dict(base.factors) if base else {}
        folders = dict(base.folders) if base else {}
        linears = [
            linear
            for linear in self._spec.linears()
            if (linear.name in only if only is not None else self._recipe.is_quantized(linear.name))
        ]
        with self._progress(name, len(linears)) as step:
            for linear in linears:
                sample = self.sample(linear)
                plan = choose(linear, sample)
                choices[linear.name], factors[linear.name] = plan.choice, plan.factor
                self._quantize(linear.name, sample, plan, folder)
                folders[linear.name] = folder
                step(1)
        return QuantizedModel(name=name, choices=choices, factors=factors, folders=folders)

    def _quantize(self, name: str, sample: LinearSample, plan: _Trial, folder: QuantizedFolder) -> None:
        weight = sample.weight if plan.factor is None else sample.weight * plan.factor
        precision = precision_of(plan.choice.precision)
        scale = precision.scales_of(weight)
        if plan.clip is not None:
            scale = scale * plan.clip[:, None]
        if plan.choice.rounding == "reconstructed":
            x = sample.x if plan.factor is None else sample.x / plan.factor
            values = gptq_round(weight, scale, x, precision)
        else:
            import torch

            values = precision.round_weight(weight, scale).to(torch.int8)
        folder.save(name, values, scale)

    def _fixed(self, alpha: float | None, linear: Linear, sample: LinearSample) -> _Trial:
        if not takes_factor(self._spec, linear.name):
            alpha = None
        factor = self._factor(linear, sample, alpha)
        choice = LinearChoice(
            precision=self._recipe.linears[linear.name], alpha=alpha, smoothing="off" if alpha is None else "alpha"
        )
        if precision_of(choice.precision).has_static_scale:
            choice = replace(choice, static_scale=static_scale_of(self._largest(linear, factor)))
        return _Trial(choice, factor)

    def _best_alpha(self, _: QuantizedModel, linear: Linear, sample: LinearSample) -> _Trial:
        precision, thin = precision_of(self._recipe.linears[linear.name]), sample.thinned()
        alphas = (None, *(_ALPHAS if takes_factor(self._spec, linear.name) else ()))
        factors = {alpha: self._factor(linear, sample, alpha) for alpha in alphas}
        errors = {alpha: thin.error(precision, factor) for alpha, factor in factors.items()}
        alpha = min(errors, key=lambda one: errors[one])
        return self._with_clipping(linear, sample, replace(self._fixed(alpha, linear, sample).choice), factors[alpha])

    def _learned_smoothing(self, base: QuantizedModel, linear: Linear, sample: LinearSample) -> _Trial:
        choice, factor = base.choices[linear.name], base.factors[linear.name]
        precision = precision_of(choice.precision)
        if precision.learns_factors and takes_factor(self._spec, linear.name):
            import torch

            tie = tie_of(self._spec, linear.name)
            start = torch.ones(linear.inputs) if factor is None else factor
            learned = learn_factor(start, sample.x, sample.weight, sample.token_weights, tie)
            thin = sample.thinned()
            if thin.error(precision, learned) < thin.error(precision, factor):
                choice, factor = replace(choice, smoothing="refined"), learned
        return self._with_clipping(linear, sample, choice, factor)

    def _gptq(self, base: QuantizedModel, linear: Linear, sample: LinearSample) -> _Trial:
        choice, factor = base.choices[linear.name], base.factors[linear.name]
        precision = precision_of(choice.precision)
        clip = clip_rows(sample, factor, precision) if choice.range == "clipped" else None
        return _Trial(replace(choice, rounding="reconstructed"), factor, clip)

    def _with_clipping(
        self, linear: Linear, sample: LinearSample, choice: LinearChoice, factor: "torch.Tensor | None"
    ) -> _Trial:
        precision = precision_of(choice.precision)
        if precision.has_static_scale:
            scale, name = static_range(sample.thinned(), factor, precision, self._largest(linear, factor))
            return _Trial(replace(choice, range=name, static_scale=scale), factor)
        if not (precision.clips_weights and self._clip_weights):
            return _Trial(choice, factor)
        thin = sample.thinned()
        clip = clip_rows(thin, factor, precision)
        if thin.error(precision, factor, clip=clip) < thin.error(precision, factor):
            return _Trial(replace(choice, range="clipped"), factor, clip_rows(sample, factor, precision))
        return _Trial(replace(choice, range="max"), factor)

    def _factor(self, linear: Linear, sample: LinearSample, alpha: float | None) -> "torch.Tensor | None":
        import torch

        if alpha is None:
            return None
        amax = self._statistics.amax[linear.name]
        factor = group_factor(self._spec, linear.name, amax, sample.weight.abs().amax(0).numpy(), alpha)
        return torch.from_numpy(factor).float()

    def _largest(self, linear: Linear, factor: "torch.Tensor | None") -> float:
        amax = self._statistics.amax[linear.name]
        return float((amax if factor is None else amax / factor.numpy()).max())
