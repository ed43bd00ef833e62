"""Sequences packed into blocks of one length, so that a training step is a few large products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.draft_heads.data_folder import ANSWER, GIVEN, USER, GeneratedSequence

if TYPE_CHECKING:
    import torch

BLOCK_POSITIONS = 512
# Blocks that are open while sequences are put into them.
_OPEN_BLOCKS = 16
# What a position's target counts in the loss: answers are what is drafted.
_WEIGHTS = {GIVEN: 1.0, USER: 0.5, ANSWER: 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some positions of a sequence."""

    sequence: GeneratedSequence
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBlock:
    """A block of N positions as tensors.

    `tokens`, `positions`, `ends` int64 [N]: `ends` is where the sequence of a position ends in the block. `features`
    float32 [N, F]. `draft_ids` int64 [N, 32] and `shares` float32 [N, 32]: likely next tokens as the head numbers them,
    with the verifier's probability, 0 where it cannot draft them or nobody asked. `weights` float32 [N]. `likeliest`
    int64 [N]: the verifier's, by its own numbers, -1 where nobody asked. `is_answer`, `is_greedy` bool [N]: whether the
    token after a position is part of an answer, and of one of likeliest tokens.
    """

    tokens: "torch.Tensor"
    positions: "torch.Tensor"
    ends: "torch.Tensor"
    features: "torch.Tensor"
    draft_ids: "torch.Tensor"
    shares: "torch.Tensor"
    weights: "torch.Tensor"
    likeliest: "torch.Tensor"
    is_answer: "torch.Tensor"
    is_greedy: "torch.Tensor"

    def seen(self, chains: "torch.Tensor") -> "torch.Tensor":
        """What chains that begin at int64 [C] see of the block: float32 [C, N], 0 or -inf."""
        import torch

        places = torch.arange(len(self.tokens), device=chains.device)
        same = self.ends[chains][:, None] == self.ends[None]
        visible = same & (places[None] <= chains[:, None])
        return torch.zeros(visible.shape, device=chains.device).masked_fill_(~visible, -torch.inf)


def pack(
    sequences: Sequence[GeneratedSequence], order: Sequence[int], block_positions: int = BLOCK_POSITIONS
) -> list[list[Piece]]:
    """Blocks of at most so many positions: each sequence goes where least room is left; long ones are cut."""
    finished: list[list[Piece]] = []
    blocks: list[tuple[int, list[Piece]]] = []
    for index in order:
        sequence = sequences[index]
        for first in range(0, len(sequence), block_positions):
            piece = Piece(sequence=sequence, first=first, end=min(first + block_positions, len(sequence)))
            fitting = [number for number, (room, _) in enumerate(blocks) if room >= len(piece)]
            if fitting:
                best = min(fitting, key=lambda number: blocks[number][0])
                room, pieces = blocks[best]
                blocks[best] = (room - len(piece), [*pieces, piece])
                continue
            if len(blocks) == _OPEN_BLOCKS:
                fullest = min(range(len(blocks)), key=lambda number: blocks[number][0])
                finished.append(blocks.pop(fullest)[1])
            blocks.append((block_positions - len(piece), [piece]))
    return finished + [pieces for _, pieces in blocks]


def draft_numbers(tokens: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """The head's number of each of the target's tokens, int64 [V]; -1 where it has none."""
    numbers = np.full(vocab_size, -1, np.int64)
    numbers[tokens] = np.arange(len(tokens))
    return numbers


def torch_block(pieces: Sequence[Piece], numbers: NDArray[np.int64], device: str = "cpu") -> TorchBlock:
    """A block's tensors; `numbers`: `draft_numbers`."""
    import torch

    def joined(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(piece.sequence, name)[piece.first : piece.end] for piece in pieces])

    lengths = np.array([len(piece) for piece in pieces])
    likely, log_probabilities = joined("likely"), joined("log_probabilities").astype(np.float32)
    draft_ids = numbers[likely]
    shares = np.where(draft_ids >= 0, np.exp(log_probabilities), 0).astype(np.float32)
    asked = np.isfinite(log_probabilities[:, 0])
    # Of the token after each position.
    kinds = np.concatenate(
        [np.append(piece.sequence.kinds, ANSWER)[piece.first + 1 : piece.end + 1] for piece in pieces]
    )
    weights = np.vectorize(_WEIGHTS.__getitem__, otypes=[np.float32])(kinds)
    is_answer = asked & (kinds == ANSWER)
    greedy = np.repeat([piece.sequence.greedy for piece in pieces], lengths)
    arrays: dict[str, NDArray[np.generic]] = {
        "tokens": joined("tokens").astype(np.int64),
        "positions": np.concatenate([np.arange(piece.first, piece.end) for piece in pieces]),
        "ends": np.repeat(np.cumsum(lengths), lengths),
        "features": joined("features").astype(np.float32),
        "draft_ids": np.maximum(draft_ids, 0),
        "shares": shares,
        "weights": np.where(asked, weights, 0).astype(np.float32),
        "likeliest": np.where(asked, likely[:, 0], -1).astype(np.int64),
        "is_answer": is_answer,
        "is_greedy": is_answer & greedy,
    }
    return TorchBlock(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
