"""How far a draft head is from its verifier: in probabilities and hidden states, over the training-time test's steps.

EAGLE's loss (2401.15077): soft cross-entropy, and the smooth L1 distance of the hidden states that the LM head reads. A
hidden state says far more of a position than its likeliest tokens do, which is what little text needs.
"""

from typing import TYPE_CHECKING

import numpy as np

from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.packed_blocks import TorchBlock
from calibration.draft_heads.sampled_tokens import sampled_tokens_of
from calibration.draft_heads.unrolled import unrolled_states

if TYPE_CHECKING:
    import torch

# EAGLE-3's: steps of the unrolled head, and how much less each counts than the one before.
STEPS = 4
DECAY = 0.8
# What the distance of hidden states, divided by their scales, counts beside the cross-entropy.
STATES = 2.0


def chains_of(block: TorchBlock, steps: int) -> "torch.Tensor":
    """Where chains begin that have something to learn: int64 [C]."""
    import torch

    places = torch.arange(len(block.tokens), device=block.tokens.device)
    useful = torch.zeros(len(places), dtype=torch.bool, device=places.device)
    for step in range(steps):
        at = places + 1 + step
        inside = at < block.ends
        useful |= inside & (block.weights[at.clamp(max=len(places) - 1)] > 0)
    return places[useful & (places + 1 < block.ends)]


def head_loss(
    model: HeadModel, block: TorchBlock, steps: int = STEPS, random: np.random.Generator | None = None
) -> "torch.Tensor | None":
    """The mean over a block's positions of each step, and over steps by weight; None where there is nothing to learn.

    Cross-entropy from the verifier's probabilities of what can be drafted, as they are: a position whose likely tokens
    cannot be drafted counts less. With `random`, a sample stands for the tokens that are likely nowhere in the block.
    """
    from torch.nn.functional import linear, smooth_l1_loss

    states = model.states(block.features)
    sampled = None if random is None else sampled_tokens_of(block, model.spec.draft_vocab_size, random)
    lm_head = model.lm_head(None if sampled is None else sampled.rows)
    ids = block.draft_ids if sampled is None else sampled.ids
    total: torch.Tensor | None = None
    weight = sum(DECAY**step for step in range(steps))
    for step, (chains, hidden) in enumerate(unrolled_states(model, block, chains_of(block, steps), steps)):
        at = chains + 1 + step
        asked = block.weights[at] > 0
        if not bool(asked.any()):
            continue
        at = at[asked]
        guessed = hidden[asked]
        logits = linear(guessed, lm_head).float()
        if sampled is not None:
            logits = logits + sampled.log_counts
        loss = _cross_entropy(logits, ids[at], block.shares[at])
        loss = loss + STATES * smooth_l1_loss(guessed, states[at], reduction="none").mean(-1)
        weights = block.weights[at]
        mean = DECAY**step / weight * (loss * weights).sum() / weights.sum()
        total = mean if total is None else total + mean
    return total


def _cross_entropy(logits: "torch.Tensor", ids: "torch.Tensor", shares: "torch.Tensor") -> "torch.Tensor":
    """Of each row: float32 [N] from logits float32 [N, tokens], ids [N, 32] and their probabilities."""
    return shares.sum(-1) * logits.logsumexp(-1) - (shares * logits.gather(-1, ids)).sum(-1)
