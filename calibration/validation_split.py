"""Calibration text that nothing is fitted to: where a search asks whether a step helped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.texts import TokenizedText

if TYPE_CHECKING:
    import torch

# One text in so many is held back; below this many texts, none can be spared.
_ONE_IN = 4
_FEWEST = 8
# The float model's probabilities of every row stay in memory.
_MOST_ROWS = 2048
_MOST_BYTES = 1 << 30


def split_validation(texts: Sequence[TokenizedText], seed: int = 0) -> tuple[list[TokenizedText], list[TokenizedText]]:
    """Texts to fit to, and a quarter of them held back; of fewer than 8 texts, all of them twice."""
    if len(texts) < _FEWEST:
        return list(texts), list(texts)
    chosen = set(np.random.default_rng(seed).permutation(len(texts))[: len(texts) // _ONE_IN].tolist())
    fitted = [text for index, text in enumerate(texts) if index not in chosen]
    return fitted, [text for index, text in enumerate(texts) if index in chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Of a model from the float one: mean KL in nats, and the share of rows with the same most likely token."""

    kl: float
    top1: float


class ValidationSplit:
    """The float model's log-probabilities on texts (at most 2048 rows), to hold others against."""

    def __init__(self, model: "torch.nn.Module", texts: Sequence[TokenizedText], vocab_size: int) -> None:
        self._model = model
        self.texts: list[tuple[int, ...]] = []
        left = min(_MOST_ROWS, _MOST_BYTES // (4 * vocab_size))
        for text in texts:
            if left > 0:
                self.texts.append(text.tokens[:left])
                left -= len(self.texts[-1])
        self._reference = [self._log_probabilities(text) for text in self.texts]

    @property
    def num_tokens(self) -> int:
        """Rows that are compared."""
        return sum(map(len, self.texts))

    def measure(self) -> Divergence:
        """Of the model as it computes now (see `simulation.simulated`)."""
        kl = agreeing = 0.0
        for text, log_p in zip(self.texts, self._reference, strict=True):
            log_q = self._log_probabilities(text)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        rows = max(1, self.num_tokens)
        return Divergence(kl=max(0.0, kl / rows), top1=agreeing / rows)

    def _log_probabilities(self, text: Sequence[int]) -> "torch.Tensor":
        import torch

        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0]
            return torch.log_softmax(logits.float(), dim=-1)
