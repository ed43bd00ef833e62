"""GPTQ (arXiv 2210.17323, algorithm 1) at 8 bits: inputs that are still to be rounded make up for earlier roundings.

With H = Σ_t x_t x_tᵀ over calibration inputs, columns are rounded one by one, and each error, weighted by H⁻¹, is added
to the columns that follow. Scales stay those of nearest rounding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.precisions.base import Precision

if TYPE_CHECKING:
    import torch

# Of the mean of H's diagonal, added to it: inputs that calibration hardly saw stay solvable.
_DAMPING = 0.01
# Columns whose corrections are collected before the rest of the weight is touched.
_COLUMNS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """What a linear's inputs say of rounding, whichever of its rows are rounded.

    `order` int64 [inputs]: in which they are rounded. `factor` float32 [inputs, inputs], in that order: the upper
    Cholesky factor of H⁻¹, which holds, row by row, the corrections that follow an input.
    """

    order: "torch.Tensor"
    factor: "torch.Tensor"


def corrections_of(x: "torch.Tensor") -> Corrections:
    """Of a linear's inputs, smoothed, float32 [tokens, inputs]."""
    import torch

    h = x.t() @ x
    h.diagonal().add_(_DAMPING * h.diagonal().mean() + torch.finfo(h.dtype).tiny)
    # Inputs that matter most are rounded first: more inputs are left to make up for their errors.
    order = h.diagonal().argsort(descending=True)
    h = h[order][:, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return Corrections(order=order, factor=factor)


def gptq_round(
    weight: "torch.Tensor", scale: "torch.Tensor", corrections: Corrections, precision: Precision
) -> "torch.Tensor":
    """Integers int8 [outputs, inputs] that stand for `weight` under `scale` with a small error of x Wᵀ.

    Args:
        weight: float32 [outputs, inputs], smoothed.
        scale: float32 [outputs, scales], each of inputs / scales inputs side by side.
        corrections: of the linear's inputs.
        precision: whose integers these are.
    """
    import torch

    inputs, order, u = weight.shape[1], corrections.order, corrections.factor
    left = weight.t()[order]
    scales = scale.t().contiguous()
    of_input = order // (inputs // len(scales))
    values = torch.empty(left.shape, dtype=torch.int8)
    for start in range(0, inputs, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, inputs)
        block = left[start:stop]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            row, step = u[start + column], scales[of_input[start + column]]
            rounded = precision.nearest(block[column], step)
            values[start + column] = rounded.to(torch.int8)
            errors[column] = (block[column] - rounded.mul_(step)) / row[start + column]
            block[column + 1 :].addr_(row[start + column + 1 : stop], errors[column], alpha=-1)
        left[stop:].addmm_(u[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty(weight.shape, dtype=torch.int8)
    result.t()[order] = values
    return result
