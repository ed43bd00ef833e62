"""The validation split: calibration text that is held out of fitting, to judge what was fitted."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.fake_quantization import fake_quantized
from calibration.texts import TokenizedText

if TYPE_CHECKING:
    import torch

    from calibration.quantized_model import QuantizedModel
    from quasar.checkpoints import DecoderSpec

# One text in four is held out; with fewer than eight texts, none can be spared.
_ONE_IN = 4
_FEWEST = 8
_ROWS_AT_ONCE = 32
# Limits of a whole model's reference: its logits at every position stay in memory.
_MOST_POSITIONS = 2048
_MOST_BYTES = 1 << 30


def holds_out(texts: Sequence[TokenizedText]) -> bool:
    """Whether some of the texts can be spared to judge by."""
    return len(texts) >= _FEWEST


def split_validation(texts: Sequence[TokenizedText], seed: int = 0) -> tuple[list[TokenizedText], list[TokenizedText]]:
    """Texts to fit to, and a quarter of them held out; fewer than 8 texts are both."""
    if not holds_out(texts):
        return list(texts), list(texts)
    chosen = set(np.random.default_rng(seed).permutation(len(texts))[: len(texts) // _ONE_IN].tolist())
    fitted = [text for index, text in enumerate(texts) if index not in chosen]
    return fitted, [text for index, text in enumerate(texts) if index in chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """From the float model: mean KL in nats, and the share of positions with the same most likely token.

    `answers_kl`: the mean over positions that predict an answer's tokens alone; over all where no text has an answer.
    """

    kl: float
    top1: float
    answers_kl: float

    def to_json(self) -> dict[str, Any]:
        """By the fields' names."""
        return asdict(self)


class DivergenceSums:
    """Sums over positions, of which `Divergence` holds the means."""

    def __init__(self) -> None:
        self._kl = self._answers_kl = 0.0
        self._positions = self._agreeing = self._answers = 0

    def add(self, exact: "torch.Tensor", logits: "torch.Tensor", answers: "torch.Tensor") -> None:
        """Add positions: logits float32 [rows, vocabulary] of the float model and of another, bool [rows]."""
        import torch

        for start in range(0, len(exact), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            log_p = torch.log_softmax(exact[rows].float(), dim=-1)
            log_q = torch.log_softmax(logits[rows].float(), dim=-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).double()
            self._kl += float(kl.sum())
            self._answers_kl += float(kl[answers[rows]].sum())
            self._agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self._positions += len(kl)
            self._answers += int(answers[rows].sum())

    def divergence(self) -> Divergence:
        """The means so far."""
        kl = _mean(self._kl, self._positions)
        answers_kl = _mean(self._answers_kl, self._answers) if self._answers else kl
        return Divergence(kl=kl, top1=self._agreeing / max(1, self._positions), answers_kl=answers_kl)


def _mean(total: float, count: int) -> float:
    """Of a KL: not below 0, as rounding may take it; infinite where logits are no numbers, which no bound lets pass."""
    return math.inf if math.isnan(total) else max(0.0, total / max(1, count))


def in_answer(text: TokenizedText) -> "torch.Tensor":
    """Which positions of a text predict a token of its answer: bool [tokens]."""
    import torch

    positions = torch.arange(len(text.tokens))
    return (positions >= len(text.prompt) - 1) & (positions < len(text.tokens) - 1)


class ValidationSplit:
    """A whole float model's logits at up to 2048 positions, to compare quantized models with."""

    def __init__(self, model: "torch.nn.Module", spec: "DecoderSpec", texts: Sequence[TokenizedText]) -> None:
        self._model = model
        self._spec = spec
        self._texts: list[TokenizedText] = []
        left = min(_MOST_POSITIONS, _MOST_BYTES // (4 * spec.vocab_size))
        for text in texts:
            if left >= len(text.tokens):
                self._texts.append(text)
                left -= len(text.tokens)
        self._reference = [self._logits(text) for text in self._texts]

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """The token sequences that are compared."""
        return [text.tokens for text in self._texts]

    def measure(self, quantized: "QuantizedModel") -> Divergence:
        """A quantized model's divergence from the float model."""
        sums = DivergenceSums()
        with fake_quantized(self._model, self._spec, quantized.fake_quantized_linears()):
            for text, reference in zip(self._texts, self._reference, strict=True):
                sums.add(reference, self._logits(text), in_answer(text))
        return sums.divergence()

    def _logits(self, text: TokenizedText) -> "torch.Tensor":
        import torch

        with torch.inference_mode():
            logits: torch.Tensor = self._model(input_ids=torch.tensor([list(text.tokens)]), use_cache=False).logits[0]
            return logits
