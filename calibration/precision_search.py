"""Mixed precision: the linears that lose most KL are raised until the verifier is as faithful as asked.

A linear climbs the ladder of `calibration.precisions`: W4A8 → W8A8 per token → W8A8 in blocks of 32 → float. The next
step is always the one that gains most KL for a millisecond of a pass on this machine; gains are estimated for each
linear alone (`calibration.sensitivity`), and the quantized model is then measured as a whole on the validation split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import FakeQuantizedLinear
from calibration.precisions.catalog import FLOAT
from calibration.quantized_model import QuantizedModel
from calibration.sensitivity import Sensitivities, measure_sensitivities
from calibration.validation_split import Divergence, ValidationSplit
from quasar.checkpoints import DecoderSpec
from quasar.errors import BuildError

if TYPE_CHECKING:
    import torch

    from calibration.block_search import Progress

# Milliseconds of a linear in a pass, by linear name and precision.
LinearLatency = Mapping[str, Mapping[str, float]]
# Least added latency of a step, so that one that measures as free does not divide by zero.
_LEAST_MS = 1e-3
# Steps are bisected to one in so many: each try runs the model over the whole validation split.
_FINEST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How faithful a verifier must be: at most `max_kl` nats of KL, at least `min_top1` of equal top-1 tokens."""

    max_kl: float | None = None
    min_top1: float | None = None

    def check(self) -> None:
        """Raise `BuildError` for a bound that nothing meets or that asks for nothing."""
        if self.max_kl is None and self.min_top1 is None:
            raise BuildError("--precision auto needs a bound: --max-kl X, --min-top1 Y, or both")
        if self.max_kl is not None and not self.max_kl > 0:
            raise BuildError(f"--max-kl is {self.max_kl:g}; a number of nats above 0 was expected")
        if self.min_top1 is not None and not 0 < self.min_top1 <= 1:
            raise BuildError(f"--min-top1 is {self.min_top1:g}; a share above 0 and up to 1 was expected")

    def with_room(self, room: float) -> "Bound":
        """A tighter one: on text outside the validation split the distance from the float model may be larger."""
        return Bound(
            max_kl=None if self.max_kl is None else room * self.max_kl,
            min_top1=None if self.min_top1 is None else 1 - room * (1 - self.min_top1),
        )

    def met(self, kl: float, top1: float) -> bool:
        """Whether figures are within it."""
        return (self.max_kl is None or kl <= self.max_kl) and (self.min_top1 is None or top1 >= self.min_top1)

    def __str__(self) -> str:
        parts = [] if self.max_kl is None else [f"KL at most {self.max_kl:g}"]
        return ", ".join(parts if self.min_top1 is None else [*parts, f"top-1 at least {self.min_top1:g}"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RaisedFigures:
    """How many linears were raised, and what the quantized model reached on the validation split."""

    num_raised: int
    kl: float
    top1: float

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        step = f"{self.num_raised} linears raised"
        return {"step": step, "kl": round(self.kl, 6), "top1": round(self.top1, 4), "kept": True}


def raise_precisions(
    models: Mapping[str, QuantizedModel],
    validation: ValidationSplit,
    latency: LinearLatency,
    target: Bound,
    spec: DecoderSpec,
    model: "torch.nn.Module",
    progress: "Progress",
) -> tuple[QuantizedModel, list[RaisedFigures]]:
    """The fastest quantized model found that meets the bound on the validation split, and the steps to it.

    `models`: the whole model at every quantized precision of the ladder, coarsest first, where linears can have it.

    Raises `BuildError` with what was reached if only float linears would meet it.
    """
    first, *higher = models
    base, raised = models[first], {name: models[name] for name in higher}
    reached = validation.measure(base)
    if target.met(reached.kl, reached.top1):
        return base, []
    forms: dict[str, dict[str, FakeQuantizedLinear]] = {
        name: {base.choices[name].precision: form} for name, form in base.fake_quantized_linears().items()
    }
    for precision, quantized in raised.items():
        for name, form in quantized.fake_quantized_linears().items():
            if quantized.choices[name].precision == precision:
                forms[name][precision] = form
    with progress("sensitivities", len(validation.sequences)) as step:
        sensitivities = measure_sensitivities(model, spec, validation.sequences, forms, on_sequence=step)
    begin = {name: base.choices[name].precision for name in sensitivities}
    climb = _Climb((*models, FLOAT.name), begin, sensitivities, latency)
    # With all steps there is no quantized linear left.
    last = climb.num_steps - 1
    failing, figures = 0, reached
    tried: dict[int, tuple[QuantizedModel, RaisedFigures]] = {}

    def meets(steps: int) -> bool:
        nonlocal failing, figures
        # Linears that are kept float take no part in the climb.
        precisions = climb.precisions(steps)
        one = base.with_precisions({**dict.fromkeys(base.choices, FLOAT.name), **precisions}, raised)
        came = validation.measure(one)
        num_raised = sum(precision != begin[name] for name, precision in precisions.items())
        tried[steps] = one, RaisedFigures(num_raised=num_raised, kl=came.kl, top1=came.top1)
        if target.met(came.kl, came.top1):
            return True
        failing, figures = steps, came
        return False

    at_least = 1
    while True:
        if failing >= last:
            raise BuildError(
                f"the bound ({target} on held-out calibration text) is met by no engine with a quantized linear: the "
                f"best reached KL {figures.kl:.2g}, top-1 {figures.top1:.4f}; ask for less, or take "
                f"--precision {FLOAT.choice}"
            )
        steps = min(climb.steps_to(target, failing, figures, at_least), last)
        if meets(steps):
            break
        # While the estimate is too hopeful, each try raises at least twice as many linears.
        at_least *= 2
    # Where no estimate chose the number of steps (top-1 has none), or all but the last one were taken, fewer may do.
    is_bisected = steps == last or (target.min_top1 is not None and steps - failing <= at_least)
    while is_bisected and steps - failing > max(1, steps // _FINEST):
        middle = (failing + steps) // 2
        if meets(middle):
            steps = middle
    return tried[steps][0], [figures for number, (_, figures) in sorted(tried.items()) if number <= steps]


class _Climb:
    """All steps from the coarsest precisions to float, in the order of what they gain."""

    def __init__(
        self,
        rungs: Sequence[str],
        begin: Mapping[str, str],
        sensitivities: Sensitivities,
        latency: LinearLatency,
    ) -> None:
        self._begin = begin
        self._added_kl = {name: {**added, FLOAT.name: 0.0} for name, added in sensitivities.items()}
        self._latency = latency
        self._steps: list[tuple[str, str]] = []
        precisions = dict(begin)
        while any(precision != FLOAT.name for precision in precisions.values()):
            _, name, precision = max(
                (self._gain(name, now, then), name, then)
                for name, now in precisions.items()
                for then in rungs[rungs.index(now) + 1 :]
                if then in self._added_kl[name]
            )
            precisions[name] = precision
            self._steps.append((name, precision))

    @property
    def num_steps(self) -> int:
        """Steps until every linear is float."""
        return len(self._steps)

    def precisions(self, steps: int) -> dict[str, str]:
        """Where each linear stands after so many steps."""
        return {**self._begin, **dict(self._steps[:steps])}

    def steps_to(self, target: Bound, steps: int, reached: Divergence, at_least: int) -> int:
        """So many further steps, or more, until the estimate, scaled to what was measured, meets a bound on KL."""
        goal = float("inf") if target.max_kl is None else target.max_kl
        scale = reached.kl / max(self._estimate(steps), 1e-12)
        tries = range(steps + at_least, self.num_steps)
        return next((more for more in tries if scale * self._estimate(more) <= goal), self.num_steps)

    def _estimate(self, steps: int) -> float:
        return sum(self._added_kl[name][precision] for name, precision in self.precisions(steps).items())

    def _gain(self, name: str, now: str, then: str) -> float:
        """Nats for a millisecond."""
        added, latency = self._added_kl[name], self._latency[name]
        return (added[now] - added[then]) / max(latency[then] - latency[now], _LEAST_MS)
