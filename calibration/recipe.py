"""Which linear gets which precision, decided before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from calibration.affine import BLOCK
from quasar.checkpoints import DecoderSpec
from quasar.errors import BuildError

Precision = Literal["w8a8", "w8a8-static", "w8a8-block", "auto", "fp32"]
LinearPrecision = Literal["w8a8-static", "w8a8-token", "w8a8-block", "float"]

Alpha = float | Literal["auto", "off"]
# What a precision begins with in every linear; "auto" raises some of them from there.
_EVERYWHERE: dict[Precision, LinearPrecision] = {
    "w8a8": "w8a8-token",
    "w8a8-static": "w8a8-static",
    "w8a8-block": "w8a8-block",
    "auto": "w8a8-token",
    "fp32": "float",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is quantized: precision per linear (by name, in graph order) and SmoothQuant's alpha.

    `alpha`: "auto" is searched (`calibration.search`), "off" does not smooth.
    """

    precision: Precision
    alpha: Alpha
    linears: dict[str, LinearPrecision]

    @property
    def float_linears(self) -> frozenset[str]:
        """Linears that keep their float weights."""
        return frozenset(name for name, precision in self.linears.items() if precision == "float")


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


def make_recipe(spec: DecoderSpec, *, precision: Precision, alpha: Alpha, keep_float: Sequence[str] = ()) -> Recipe:
    """The recipe for a spec. A `keep_float` pattern (shell style) names linears, fused or as in the checkpoint.

    Raises `BuildError` for a pattern that matches nothing, and for blocks where inputs are no multiple of 32.
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
    linears: dict[str, LinearPrecision] = {
        linear.name: "float" if linear.name in kept else _EVERYWHERE[precision] for linear in spec.linears()
    }
    for linear in spec.linears():
        if linears[linear.name] == "w8a8-block" and linear.inputs % BLOCK:
            raise BuildError(
                f"{linear.name} has {linear.inputs} inputs; --precision w8a8-block needs a multiple of {BLOCK}: "
                f"keep it float (--keep-float {linear.name}), or take --precision w8a8"
            )
    return Recipe(precision=precision, alpha=alpha, linears=linears)
