"""The validation split: calibration text that is held out of fitting, to judge the steps of a search."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.texts import TokenizedText

if TYPE_CHECKING:
    import torch

# One text in four is held out; with fewer than eight texts, none can be spared.
_ONE_IN = 4
_FEWEST = 8
# Limits: the float model's probabilities at every position stay in memory.
_MOST_POSITIONS = 2048
_MOST_BYTES = 1 << 30


def split_validation(texts: Sequence[TokenizedText], seed: int = 0) -> tuple[list[TokenizedText], list[TokenizedText]]:
    """Texts to fit to, and a quarter of them held out; fewer than 8 texts are both."""
    if len(texts) < _FEWEST:
        return list(texts), list(texts)
    chosen = set(np.random.default_rng(seed).permutation(len(texts))[: len(texts) // _ONE_IN].tolist())
    fitted = [text for index, text in enumerate(texts) if index not in chosen]
    return fitted, [text for index, text in enumerate(texts) if index in chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """From the float model: mean KL in nats, and the share of positions with the same most likely token."""

    kl: float
    top1: float


class ValidationSplit:
    """The float model's log-probabilities at up to 2048 positions, to compare quantized models with."""

    def __init__(self, model: "torch.nn.Module", texts: Sequence[TokenizedText], vocab_size: int) -> None:
        self._model = model
        self.sequences: list[tuple[int, ...]] = []
        left = min(_MOST_POSITIONS, _MOST_BYTES // (4 * vocab_size))
        for text in texts:
            if left > 0:
                self.sequences.append(text.tokens[:left])
                left -= len(self.sequences[-1])
        self._reference = [self._log_probabilities(sequence) for sequence in self.sequences]

    @property
    def num_tokens(self) -> int:
        """Positions that are compared."""
        return sum(map(len, self.sequences))

    def measure(self) -> Divergence:
        """Of the model as it computes now (see `fake_quantization.fake_quantized`)."""
        kl = agreeing = 0.0
        for sequence, log_p in zip(self.sequences, self._reference, strict=True):
            log_q = self._log_probabilities(sequence)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        positions = max(1, self.num_tokens)
        return Divergence(kl=max(0.0, kl / positions), top1=agreeing / positions)

    def _log_probabilities(self, sequence: Sequence[int]) -> "torch.Tensor":
        import torch

        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([list(sequence)]), use_cache=False).logits[0]
            return torch.log_softmax(logits.float(), dim=-1)
