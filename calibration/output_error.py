"""What quantizing one linear does to its output, on a sample of its inputs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibration.fake_quantization import row_slices
from calibration.precisions.base import Precision
from quasar.numerics import static_scale_of

if TYPE_CHECKING:
    import torch

# What a search over many factors reads at most: a part of a long sample, or of a head's 150,000 outputs, is enough.
_MOST_TOKENS = 512
_MOST_OUTPUTS = 3072


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSample:
    """A linear with inputs that calibration saw.

    `x` float32 [tokens, inputs], `weight` [outputs, inputs] in any float type; `amax` float32 [inputs]: of all inputs,
    of which `x` may be a part. `token_weights` float32 [tokens]: the weight of an error, 1 / mean square of the
    residual stream that the output is added to: errors as the next norm sees them.
    """

    x: "torch.Tensor"
    weight: "torch.Tensor"
    amax: "torch.Tensor"
    token_weights: "torch.Tensor"

    def thinned(self, tokens: int = _MOST_TOKENS) -> "LinearSample":
        """At most so many tokens and 3072 outputs, evenly spread, the weight in float32."""
        every = slice(None, None, -(-len(self.x) // tokens))
        weight = self.weight[self.thin_outputs].float()
        return replace(self, x=self.x[every], token_weights=self.token_weights[every], weight=weight)

    def crossed(self, tokens: int) -> "Iterator[tuple[torch.Tensor, LinearSample]]":
        """For each half of the sample, the other's amax float32 [inputs], and the half, thinned to so many tokens.

        Halves are runs of tokens, so that they share one text at most. A single token is both.
        """
        middle = len(self.x) // 2
        parts = (slice(0, middle), slice(middle, None)) if middle else (slice(None),)
        for seen, judging in zip(parts, reversed(parts), strict=True):
            half = replace(self, x=self.x[judging], token_weights=self.token_weights[judging])
            yield self.x[seen].abs().amax(0), half.thinned(tokens)

    @property
    def thin_outputs(self) -> slice:
        """The outputs of `thinned`."""
        return slice(None, None, -(-len(self.weight) // _MOST_OUTPUTS))

    def parts(self) -> Iterator[tuple[slice, "LinearSample"]]:
        """Rows of the weight, and the sample with those alone, in float32: at most 16 M values at once."""
        for rows in row_slices(*self.weight.shape):
            yield rows, replace(self, weight=self.weight[rows].float())

    def weight_amax(self) -> "torch.Tensor":
        """The largest weight of each input, float32 [inputs]."""
        import torch

        return torch.stack([part.weight.abs().amax(0) for _, part in self.parts()]).amax(0)

    def error(
        self,
        precision: Precision,
        factor: "torch.Tensor | None",
        *,
        clip: "torch.Tensor | None" = None,
        static_scale: float | None = None,
    ) -> float:
        """Weighted squared error of the output under a precision, rounded to nearest, relative to the output's own.

        The weight is float32.

        Args:
            factor: smoothing factor float32 [inputs].
            clip: share of each scale's range that integers span, float32 [outputs, scales]; None: all of it.
            static_scale: of activations, where the precision has one; None: by the largest of the sample.
        """
        x = self.x if factor is None else self.x / factor
        weight = self.weight if factor is None else self.weight * factor
        scale = precision.scales_of(weight)
        if clip is not None:
            scale = precision.stored_scales(scale * clip)
        if precision.has_static_scale and static_scale is None:
            static_scale = static_scale_of(float(x.abs().max()))
        y = precision.fake_quantized_product(x, precision.rounded(weight, scale), static_scale or 0.0)
        exact = self.x @ self.weight.t()
        u = self.token_weights[:, None]
        return float((u * (y - exact).square_()).sum() / (u * exact.square_()).sum().clamp_min(1e-30))
