"""Where the training of a draft head begins: the linear that guesses the next hidden state best, in closed form.

Ridge regression of the hidden state after a token on the embedding of that token and the hidden state before it. It
takes seconds, and guesses better than the first thousands of a training's updates would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.draft_heads.data_folder import GeneratedSequence

if TYPE_CHECKING:
    import torch

Float32 = NDArray[np.float32]

# More of them change the guess little.
_MOST_POSITIONS = 300_000
# Of a product whose sums are float32.
_POSITIONS_AT_ONCE = 4096
# Of each input's own mean square.
_RIDGE = 1e-3
# Of the largest channel's scale: a channel that is nearly silent has at least this one.
_LEAST_SCALE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScales:
    """Root mean squares: `hidden` float32 [H], of the channels of normed hidden states; `embedding`, of embeddings."""

    hidden: Float32
    embedding: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGuess:
    """`weight` float32 [H, 2 H], embedding first, and `bias` float32 [H] guess a normed hidden state."""

    weight: Float32
    bias: Float32
    scales: InputScales


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetParts:
    """What a head reads by the target's weights: `embedding` [V, H] of any float type, the final norm's `norm` [H]."""

    embedding: "torch.Tensor"
    norm: "torch.Tensor"
    eps: float

    def normed(self, features: "torch.Tensor") -> "torch.Tensor":
        """Hidden states float32 [N, H] after the final norm."""
        from torch.nn.functional import rms_norm

        return rms_norm(features, self.norm.shape, self.norm, self.eps)


def linear_guess(sequences: Sequence[GeneratedSequence], target: TargetParts) -> LinearGuess:
    """The guess that is best on these sequences."""
    import torch

    hidden = len(target.norm)
    squares = torch.zeros(2 * hidden + 1, 2 * hidden + 1, dtype=torch.float64)
    products = torch.zeros(2 * hidden + 1, hidden, dtype=torch.float64)
    power = torch.zeros(hidden, dtype=torch.float64)
    positions = 0
    inputs: list[torch.Tensor] = []
    following: list[torch.Tensor] = []
    for number, sequence in enumerate(sequences, start=1):
        states = target.normed(torch.from_numpy(np.array(sequence.features, np.float32)))
        tokens = torch.from_numpy(np.array(sequence.tokens, np.int64))
        embedded = target.embedding[tokens[1:]].float()
        inputs.append(torch.cat([embedded, states[:-1], torch.ones(len(embedded), 1)], dim=1))
        following.append(states[1:])
        power += (states * states).sum(0).double()
        positions += len(states)
        is_last = positions >= _MOST_POSITIONS or number == len(sequences)
        # Many positions a product: what it is added to is as large for a short sequence.
        if is_last or sum(map(len, inputs)) >= _POSITIONS_AT_ONCE:
            rows = torch.cat(inputs)
            squares += (rows.T @ rows).double()
            products += (rows.T @ torch.cat(following)).double()
            inputs, following = [], []
        if is_last:
            break
    ridge = squares.diagonal().clamp(min=1e-6) * _RIDGE
    # The mean is free.
    ridge[-1] = 1e-6
    solved = torch.linalg.solve(squares + torch.diag(ridge), products).float().numpy()
    scale = np.sqrt(power.numpy() / max(positions, 1))
    mean_square = float(squares.diagonal()[:hidden].mean()) / max(float(squares[-1, -1]), 1.0)
    return LinearGuess(
        weight=np.ascontiguousarray(solved[:-1].T),
        bias=solved[-1].copy(),
        scales=InputScales(
            hidden=np.maximum(scale, max(_LEAST_SCALE * float(scale.max()), 1e-6)).astype(np.float32),
            embedding=max(mean_square, 1e-12) ** 0.5,
        ),
    )
