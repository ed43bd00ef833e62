"""How far a verifier's answers are from the float model's, on fixed tokens: KL, top-1 agreement, perplexity."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.texts import TokenizedText

if TYPE_CHECKING:
    import torch

Float32 = NDArray[np.float32]

# Logits [rows, V] of consecutive rows of a token sequence, in order, in pieces.
LogitsReader = Callable[[Sequence[int]], Iterator[Float32]]

_ROWS_AT_ONCE = 64


def log_softmax(logits: Float32) -> Float32:
    """Row by row log-probabilities of logits float32 [rows, V]; the sum runs in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    log_probabilities: Float32 = (shifted - np.log(total)).astype(np.float32)
    return log_probabilities


def kl_nats(log_p: Float32, log_q: Float32) -> NDArray[np.float64]:
    """KL(p‖q) per row in nats, from log-probabilities float32 [rows, V]: float64 [rows]."""
    kl: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1, dtype=np.float64)
    return kl


@dataclass(slots=True)
class Tally:
    """Running sums over rows."""

    rows: int = 0
    kl: float = 0.0
    agreeing: int = 0
    predicted: int = 0
    nll: float = 0.0
    nll_float: float = 0.0

    def add(self, reference: Float32, engine: Float32, following: NDArray[np.int64]) -> None:
        """Add rows: logits float32 [rows, V] of both, and the token that follows each row, -1 where none does."""
        for start in range(0, len(reference), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            log_p, log_q, token = log_softmax(reference[part]), log_softmax(engine[part]), following[part]
            self.rows += len(token)
            self.kl += float(kl_nats(log_p, log_q).sum())
            self.agreeing += int((log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum())
            known = np.flatnonzero(token >= 0)
            self.predicted += len(known)
            self.nll -= float(log_q[known, token[known]].sum(dtype=np.float64))
            self.nll_float -= float(log_p[known, token[known]].sum(dtype=np.float64))

    def figures(self) -> dict[str, Any]:
        """Means over the rows; perplexity over the rows whose next token is known."""
        rows, predicted = max(self.rows, 1), max(self.predicted, 1)
        return {
            # Rounding alone can take a KL of zero below it.
            "mean_kl_nats": max(0.0, round(self.kl / rows, 6)),
            "top1_agreement": round(self.agreeing / rows, 6),
            "perplexity": round(math.exp(self.nll / predicted), 4),
            "perplexity_float": round(math.exp(self.nll_float / predicted), 4),
            "tokens": self.rows,
        }


def compare(
    texts: Sequence[TokenizedText],
    reference: LogitsReader,
    engine: LogitsReader,
    on_text: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fidelity on the prompts' own tokens, and under `continuation` on the float model's continuations.

    A continuation's rows are the ones that predict its tokens: the positions that a verifier decides.
    """
    return compare_several(texts, reference, [engine], on_text)[0]


def compare_several(
    texts: Sequence[TokenizedText],
    reference: LogitsReader,
    engines: Sequence[LogitsReader],
    on_text: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """`compare` for several engines; the reference reads each text once."""
    tallies = [(Tally(), Tally()) for _ in engines]
    for text in texts:
        expected = list(reference(text.tokens))
        for engine, (prompts, continuations) in zip(engines, tallies, strict=True):
            _compare_text(text, iter(expected), engine(text.tokens), prompts, continuations)
        on_text()
    return [{**prompts.figures(), "continuation": continuations.figures()} for prompts, continuations in tallies]


def _compare_text(
    text: TokenizedText,
    reference: Iterator[Float32],
    engine: Iterator[Float32],
    prompts: Tally,
    continuations: Tally,
) -> None:
    tokens = np.asarray(text.tokens, np.int64)
    following = np.append(tokens[1:], -1)
    border = len(text.prompt)
    start = 0
    for p, q in _in_step(reference, engine):
        rows = np.arange(start, start + len(p))
        inside, behind = rows < border, (rows >= border - 1) & (rows < len(tokens) - 1)
        if inside.any():
            prompts.add(p[inside], q[inside], np.where(rows < border - 1, following[rows], -1)[inside])
        if behind.any():
            continuations.add(p[behind], q[behind], following[rows[behind]])
        start += len(p)


def torch_logits(model: "torch.nn.Module") -> LogitsReader:
    """Logits of a transformers model over a whole sequence."""

    def read(tokens: Sequence[int]) -> Iterator[Float32]:
        import torch

        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
        yield logits

    return read


def _in_step(a: Iterator[Float32], b: Iterator[Float32]) -> Iterator[tuple[Float32, Float32]]:
    """Cut two streams of rows at the same places."""
    left = right = np.empty((0, 0), np.float32)
    while True:
        left = left if len(left) else next(a, left)
        right = right if len(right) else next(b, right)
        rows = min(len(left), len(right))
        if rows == 0:
            return
        yield left[:rows], right[:rows]
        left, right = left[rows:], right[rows:]
