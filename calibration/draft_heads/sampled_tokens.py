"""Which tokens a training step compares: all that are likely somewhere in the block, and a sample for the others.

The LM head over a whole vocabulary is half of a step. A sampled token stands for as many as were left out for it, so
that the sum of exponentials is right in the mean (sampled softmax: arXiv 1412.2007, section 3).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.draft_heads.packed_blocks import TorchBlock

if TYPE_CHECKING:
    import torch

# Tokens that are sampled of the unlikely ones.
SAMPLED = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """C of the tokens that a head drafts.

    `rows` int64 [C]: their numbers. `log_counts` float32 [C]: the logarithm of how many tokens each stands for. `ids`
    int64 [N, 32]: where the block's likely tokens are among them; 0 where the head cannot draft one.
    """

    rows: "torch.Tensor"
    log_counts: "torch.Tensor"
    ids: "torch.Tensor"


def sampled_tokens_of(block: TorchBlock, vocabulary: int, random: np.random.Generator) -> SampledTokens | None:
    """Those of a block, for a head that drafts so many tokens; None where as good as all of them would be."""
    import torch

    device = block.draft_ids.device
    used = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    used[block.draft_ids[block.shares > 0]] = True
    likely, others = used.nonzero()[:, 0], (~used).nonzero()[:, 0]
    if len(others) <= 2 * SAMPLED:
        return None
    chosen = torch.from_numpy(random.choice(len(others), SAMPLED, replace=False)).to(device)
    rows = torch.cat([likely, others[chosen]])
    places = torch.zeros(vocabulary, dtype=torch.int64, device=device)
    places[rows] = torch.arange(len(rows), device=device)
    log_counts = torch.zeros(len(rows), device=device)
    log_counts[len(likely) :] = math.log(len(others) / SAMPLED)
    return SampledTokens(
        rows=rows, log_counts=log_counts, ids=torch.where(block.shares > 0, places[block.draft_ids], 0)
    )
