"""Learned smoothing: gradient descent adjusts the factors channel by channel, from those that one alpha gives.

The expected rounding error has a closed form, and learned factors make it smaller than those of any alpha do. With
steps proportional to the largest value of a row, and rounding errors uniform and independent, the expected squared
error of y = x Wᵀ in INT8 is proportional to

    Σ_t u_t max_j (x_tj / s_j)² · Σ_ij (w_ij s_j)²   +   Σ_i max_j (w_ij s_j)² · Σ_tj u_t (x_tj / s_j)²

(activations first, weights second; u_t weighs tokens). Scaling s as a whole changes nothing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STEPS = 80
_RATE = 0.05
# What a gradient step reads at most: a sample of tokens and outputs is enough for the maxima.
_MOST_TOKENS = 512
_MOST_OUTPUTS = 512
# Adam's own constants (arXiv 1412.6980). It is written out below, since torch.optim rounds in another order from
# version to version, and the same build must give the same bytes.
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


def learn_factor(
    factor: "torch.Tensor",
    x: "torch.Tensor",
    weight: "torch.Tensor",
    token_weights: "torch.Tensor",
    tie: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
) -> "torch.Tensor":
    """A factor float32 [inputs] with a smaller expected rounding error than `factor`, or that itself.

    Args:
        factor: where to begin, float32 [inputs].
        x: inputs of the linear, float32 [tokens, inputs].
        weight: float32 [outputs, inputs].
        token_weights: u, float32 [tokens].
        tie: makes inputs that must share a factor equal: a mean of log s, and of its gradient.
    """
    import torch

    if tie is None:
        tie = _untied
    every = -(-len(x) // _MOST_TOKENS)
    error = _RoundingError(x[::every], weight[:: -(-len(weight) // _MOST_OUTPUTS)], token_weights[::every])
    log_s = tie(factor.log())
    best, least = factor, error(2 * log_s)[0]
    mean, square = torch.zeros_like(log_s), torch.zeros_like(log_s)
    for step in range(1, _STEPS + 1):
        loss, gradient = error(2 * log_s)
        if loss < least:
            best, least = log_s.exp(), loss
        gradient = tie(gradient)
        mean = _BETA_1 * mean + (1 - _BETA_1) * gradient
        square = _BETA_2 * square + (1 - _BETA_2) * gradient.square()
        direction = mean / (1 - _BETA_1**step) / ((square / (1 - _BETA_2**step)).sqrt() + _EPSILON)
        log_s = log_s - _RATE * (1 - step / _STEPS) * direction
    return best


def _untied(log_factor: "torch.Tensor") -> "torch.Tensor":
    return log_factor


class _RoundingError:
    """The logarithm of the formula above, and its gradient by log s."""

    def __init__(self, x: "torch.Tensor", weight: "torch.Tensor", u: "torch.Tensor") -> None:
        self._x_2, self._w_2, self._u = x.square(), weight.square(), u
        self._columns = self._w_2.sum(0)
        self._inputs = u @ self._x_2

    def __call__(self, log_s_2: "torch.Tensor") -> tuple[float, "torch.Tensor"]:
        s_2 = log_s_2.exp()
        row, at = (self._x_2 / s_2).max(1)
        column, where = (self._w_2 * s_2).max(1)
        row = row * self._u
        weights, activations = self._columns * s_2, self._inputs / s_2
        a, b, c, d = row.sum(), weights.sum(), column.sum(), activations.sum()
        loss = a * b + c * d
        gradient = a * weights - d.new_zeros(len(s_2)).index_add_(0, at, row) * b
        gradient += d.new_zeros(len(s_2)).index_add_(0, where, column) * d - c * activations
        return float(loss.log()), 2 * gradient / loss
