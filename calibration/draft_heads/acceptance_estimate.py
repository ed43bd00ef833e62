"""What a head would be worth, on sequences that it never learned from: agreement with the verifier by depth."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.packed_blocks import TorchBlock
from calibration.draft_heads.unrolled import unrolled_states

DEPTHS = 5
WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceEstimate:
    """Figures by depth, 1 to 5; the head runs on its own hidden states and is fed the tokens of the text.

    `coverage`: by width k, how often the verifier's likeliest token is among the head's k likeliest. `chain`: tokens
    that a round emits, the verifier's own included, with chains of 1 to 5 drafts: over greedy answers, where the text
    is what the verifier says. `positions`: answer positions that were looked at.
    """

    coverage: dict[str, list[float]]
    chain: list[float]
    positions: int

    @property
    def agreement(self) -> list[float]:
        """How often the head's likeliest token is the verifier's."""
        return self.coverage["1"]

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)

    def __str__(self) -> str:
        depths = " ".join(f"{share:.3f}" for share in self.agreement)
        return f"agreement by depth {depths}, acceptance length {self.chain[-1]:.2f}"


def estimate(
    model: HeadModel, blocks: Sequence[TorchBlock], tokens: NDArray[np.int64], depths: int = DEPTHS
) -> AcceptanceEstimate:
    """The figures over held-out blocks; `tokens`: the target's, of each that the head drafts."""
    import torch

    of_draft = torch.from_numpy(tokens).to(model.device)
    found = np.zeros((len(WIDTHS), depths))
    seen = np.zeros(depths)
    accepted, starts = np.zeros(depths), 0
    with torch.no_grad():
        for block in blocks:
            places = torch.arange(len(block.tokens), device=model.device)
            chains = places[:-1][block.is_answer[1:] & (places[:-1] + 1 < block.ends[:-1])]
            # Chains that have been right so far, of those that begin in a greedy answer.
            right = torch.zeros(len(places), dtype=torch.bool, device=model.device)
            right[chains] = block.is_greedy[chains + 1]
            starts += int(right.sum())
            for depth, (going, hidden) in enumerate(unrolled_states(model, block, chains, depths)):
                at = going + 1 + depth
                asked = block.is_answer[at]
                width = min(WIDTHS[-1], len(tokens))
                drafted = of_draft[model.logits(hidden).topk(width, dim=-1).indices]
                same = drafted == block.likeliest[at][:, None]
                seen[depth] += int(asked.sum())
                for number, count in enumerate(WIDTHS):
                    found[number, depth] += int((same[:, :count].any(-1) & asked).sum())
                going_right = torch.zeros_like(right)
                going_right[going] = right[going] & same[:, 0] & asked
                right = going_right
                accepted[depth] += int(right.sum())
    shares = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
    chain = 1 + np.cumsum(accepted) / max(starts, 1)
    return AcceptanceEstimate(
        coverage={str(width): [round(float(one), 4) for one in row] for width, row in zip(WIDTHS, shares, strict=True)},
        chain=[round(float(one), 3) for one in chain],
        positions=int(seen[0]),
    )
