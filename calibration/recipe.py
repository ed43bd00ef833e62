"""Which linear gets which precision, decided before any work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from calibration.precisions.base import Precision
from calibration.precisions.catalog import DEFAULT_CHOICE, FLOAT, STORED_CHOICES, precision_of, precisions_for
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import Linear
from quasar.errors import BuildError

Alpha = float | Literal["auto", "off"]

# How far from the float model's the answers of the default precision may be: mean KL in nats where answers are
# predicted. Above it a finer one is taken.
GATE_KL = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is quantized: what `--precision` asked for, a precision per linear (names, in graph order), alpha.

    `alpha` is SmoothQuant's: "auto" is searched (`calibration.search`), "off" does not smooth. `gate`: the largest KL
    on answers, in nats, with which `precision` is taken; above it, the next finer one is. None: `precision` was asked
    for.
    """

    precision: str
    alpha: Alpha
    linears: dict[str, str]
    gate: float | None = None

    def is_quantized(self, linear: str) -> bool:
        """Whether a linear gets integer weights."""
        return precision_of(self.linears[linear]).is_quantized

    def as_float(self) -> "Recipe":
        """The same without a quantized linear."""
        return replace(self, linears=dict.fromkeys(self.linears, FLOAT.name))

    @property
    def quantizes(self) -> bool:
        """Whether any linear gets integer weights."""
        return any(map(self.is_quantized, self.linears))


def parse_alpha(text: str | float | None) -> Alpha:
    """What `--alpha` says: auto (the default), off, or a number from 0 to 1; else raises `BuildError`."""
    if text is None or text == "auto":
        return "auto"
    if text == "off":
        return "off"
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise BuildError(
            f"--alpha is {text}; auto, off, or a number from 0 (all difficulty in the activations) to 1 was expected"
        )
    return alpha


def make_recipe(
    spec: DecoderSpec,
    *,
    precision: str | None,
    alpha: Alpha,
    keep_float: Sequence[str] = (),
    blocks: bool = True,
) -> Recipe:
    """The recipe for a spec; precision None is the default one, which a gate decides on.

    A `keep_float` pattern (shell style) names linears, fused or as in the checkpoint. `blocks`: whether a linear of a
    quantized checkpoint that is rounded anew gets its scales in blocks, where it can.

    Raises `BuildError` for a pattern that matches nothing, and for inputs that a precision cannot split into blocks.
    """
    kept: set[str] = set()
    for pattern in keep_float:
        matches = {
            linear.name
            for linear in spec.linears()
            if any(fnmatchcase(name, pattern) for name in (linear.name, *linear.members))
        }
        if not matches:
            raise BuildError(
                f"--keep-float {pattern!r} matches no linear; names look like "
                "layers.0.self_attn.qkv_proj, layers.0.mlp.down_proj and lm_head"
            )
        kept |= matches
    gate, precision = (GATE_KL, DEFAULT_CHOICE) if precision is None else (None, precision)
    possible = precisions_for(DEFAULT_CHOICE if precision in STORED_CHOICES and not blocks else precision)
    linears = {linear.name: FLOAT if linear.name in kept else _coarsest(possible, linear) for linear in spec.linears()}
    for linear in spec.linears():
        multiple = linears[linear.name].input_multiple
        if linear.inputs % multiple:
            raise BuildError(
                f"{linear.name} has {linear.inputs} inputs; --precision {precision} needs a multiple of {multiple}: "
                f"keep it float (--keep-float {linear.name}), or take --precision {DEFAULT_CHOICE}"
            )
    names = {name: chosen.name for name, chosen in linears.items()}
    return Recipe(precision=precision, alpha=alpha, linears=names, gate=gate)


def _coarsest(possible: Sequence[Precision], linear: Linear) -> Precision:
    """The first that a linear can have; where there is none, the first."""
    return next((one for one in possible if linear.inputs % one.input_multiple == 0), possible[0])
