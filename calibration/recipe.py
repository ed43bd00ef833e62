"""Which linear gets which precision, decided before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from quasar.checkpoints import DecoderSpec
from quasar.errors import BuildError

Precision = Literal["w8a8", "fp32"]
LinearPrecision = Literal["w8a8-token", "float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is quantized: precision per linear (by name, in graph order) and SmoothQuant's alpha."""

    precision: Precision
    alpha: float
    linears: dict[str, LinearPrecision]

    @property
    def float_linears(self) -> frozenset[str]:
        """Linears that keep their float weights."""
        return frozenset(name for name, precision in self.linears.items() if precision == "float")


def make_recipe(spec: DecoderSpec, *, precision: Precision, alpha: float, keep_float: Sequence[str] = ()) -> Recipe:
    """The recipe for a spec. A `keep_float` pattern (shell style) names linears, fused or as in the checkpoint.

    Raises `BuildError` for an alpha outside [0, 1] and for a pattern that matches nothing.
    """
    if not 0 <= alpha <= 1:
        raise BuildError(f"--alpha is {alpha}; a number from 0 (all difficulty in the activations) to 1 was expected")
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
        linear.name: "float" if precision == "fp32" or linear.name in kept else "w8a8-token"
        for linear in spec.linears()
    }
    return Recipe(precision=precision, alpha=alpha, linears=linears)
