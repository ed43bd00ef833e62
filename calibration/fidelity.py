"""How far a verifier's answers are from the float model's, on fixed tokens: KL, top-1 agreement, perplexity."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.texts import TokenizedText
from quasar.errors import EngineError

if TYPE_CHECKING:
    import torch

Float32 = NDArray[np.float32]

# Token ids of a sequence → its logits [positions, V], in order, in pieces.
LogitsReader = Callable[[Sequence[int]], Iterator[Float32]]

_POSITIONS_AT_ONCE = 64


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


# Lower ends of the bins in which positions are reported; the last one has no upper end.
POSITION_BINS = (0, 16, 32, 64, 128, 256, 512)
# Gaps between the verifier's two most likely tokens, in nats, below which positions are counted.
MARGINS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(slots=True)
class FidelitySums:
    """Divergence, agreement and margin at every position, and sums over those whose next token is known."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    agrees: list[NDArray[np.bool_]] = field(default_factory=list)
    # Between the engine's two most likely tokens, in nats.
    margin: list[Float32] = field(default_factory=list)
    position: list[NDArray[np.int64]] = field(default_factory=list)
    predicted: int = 0
    nll: float = 0.0
    nll_float: float = 0.0

    def add(
        self,
        reference: Float32,
        engine: Float32,
        following: NDArray[np.int64],
        positions: NDArray[np.int64] | None = None,
    ) -> None:
        """Add positions: logits float32 [M, V] of both, and the token that follows each position, -1 where none does.

        `positions`: in their sequence, int64 [M]; None counts from 0.
        """
        places = np.arange(len(reference)) if positions is None else positions
        for start in range(0, len(reference), _POSITIONS_AT_ONCE):
            part = slice(start, start + _POSITIONS_AT_ONCE)
            log_p, log_q, token = log_softmax(reference[part]), log_softmax(engine[part]), following[part]
            kl = kl_nats(log_p, log_q)
            if np.isnan(kl).any():
                raise EngineError(
                    "logits that are compared are no numbers (NaN): weights or activations overflow, or a weight is "
                    "damaged; fidelity cannot be told"
                )
            self.kl.append(kl)
            self.agrees.append(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
            second, first = np.partition(log_q, -2, axis=-1)[:, -2:].T
            self.margin.append(first - second)
            self.position.append(places[part])
            known = np.flatnonzero(token >= 0)
            self.predicted += len(known)
            self.nll -= float(log_q[known, token[known]].sum(dtype=np.float64))
            self.nll_float -= float(log_p[known, token[known]].sum(dtype=np.float64))

    def figures(self) -> dict[str, Any]:
        """Means over the positions; perplexity over those whose next token is known."""
        count = sum(map(len, self.kl))
        kl, agreeing = (float(sum(part.sum() for part in parts)) for parts in (self.kl, self.agrees))
        return {
            # Rounding alone can take a KL of zero below it.
            "mean_kl_nats": max(0.0, round(kl / max(count, 1), 6)),
            "top1_agreement": round(agreeing / max(count, 1), 6),
            "perplexity": round(math.exp(self.nll / max(self.predicted, 1)), 4),
            "perplexity_float": round(math.exp(self.nll_float / max(self.predicted, 1)), 4),
            "tokens": count,
        }

    def details(self) -> dict[str, Any]:
        """Divergence and agreement by position, and the margin table; bins without positions are left out."""
        if not self.kl:
            return {"by_position": [], "margins": []}
        kl, agrees = np.concatenate(self.kl), np.concatenate(self.agrees)
        margin, position = np.concatenate(self.margin), np.concatenate(self.position)
        by_position = []
        for first, end in zip(POSITION_BINS, (*POSITION_BINS[1:], None), strict=True):
            inside = (position >= first) & (position < (np.inf if end is None else end))
            if inside.any():
                by_position.append(
                    {
                        "first": first,
                        "end": end,
                        "tokens": int(inside.sum()),
                        "mean_kl_nats": round(float(kl[inside].mean()), 6),
                        "top1_agreement": round(float(agrees[inside].mean()), 6),
                    }
                )
        margins = []
        for limit in MARGINS:
            below = margin < limit
            margins.append(
                {
                    "below": limit,
                    "rows": round(float(below.mean()), 6),
                    # Of those positions, and of all disagreements: what checking those positions alone would catch.
                    "disagreeing": round(float((~agrees[below]).mean()), 6) if below.any() else 0.0,
                    "caught": round(float((below & ~agrees).sum() / max((~agrees).sum(), 1)), 6),
                }
            )
        return {"by_position": by_position, "margins": margins}


@dataclass(slots=True)
class Comparison:
    """An engine against the reference: on the prompts' own tokens, and on the continuations."""

    prompts: FidelitySums = field(default_factory=FidelitySums)
    continuation: FidelitySums = field(default_factory=FidelitySums)

    def figures(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {**self.prompts.figures(), "continuation": self.continuation.figures()}

    def details(self) -> dict[str, Any]:
        """What a report adds."""
        return {"prompts": self.prompts.details(), "continuation": self.continuation.details()}

    def add(self, text: TokenizedText, reference: Iterator[Float32], engine: Iterator[Float32]) -> None:
        """Add the positions of one text. A continuation's positions are the ones that predict its tokens."""
        tokens = np.asarray(text.tokens, np.int64)
        following = np.append(tokens[1:], -1)
        border = len(text.prompt)
        start = 0
        for p, q in _in_step(reference, engine):
            positions = np.arange(start, start + len(p))
            inside = positions < border
            predicting = (positions >= border - 1) & (positions < len(tokens) - 1)
            if inside.any():
                known = np.where(positions < border - 1, following[positions], -1)
                self.prompts.add(p[inside], q[inside], known[inside], positions[inside])
            if predicting.any():
                at = positions[predicting]
                self.continuation.add(p[predicting], q[predicting], following[at], at)
            start += len(p)


def compare(
    texts: Sequence[TokenizedText],
    reference: LogitsReader,
    engine: LogitsReader,
    on_text: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fidelity on the prompts' own tokens, and under `continuation` on what follows them.

    A continuation's positions are the ones that predict its tokens, which is where a verifier decides.
    """
    return compare_several(texts, reference, [engine], on_text)[0].figures()


def compare_several(
    texts: Sequence[TokenizedText],
    reference: LogitsReader,
    engines: Sequence[LogitsReader],
    on_text: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Several engines against one reference, which reads each text once."""
    comparisons = [Comparison() for _ in engines]
    for text in texts:
        expected = list(reference(text.tokens))
        for engine, comparison in zip(engines, comparisons, strict=True):
            comparison.add(text, iter(expected), engine(text.tokens))
        on_text()
    return comparisons


def torch_logits(model: "torch.nn.Module") -> LogitsReader:
    """Logits of a transformers model over a whole sequence."""

    def read(tokens: Sequence[int]) -> Iterator[Float32]:
        import torch

        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
        yield logits

    return read


def _in_step(a: Iterator[Float32], b: Iterator[Float32]) -> Iterator[tuple[Float32, Float32]]:
    """Cut two streams of logits at the same positions."""
    left = right = np.empty((0, 0), np.float32)
    while True:
        left = left if len(left) else next(a, left)
        right = right if len(right) else next(b, right)
        count = min(len(left), len(right))
        if count == 0:
            return
        yield left[:count], right[:count]
        left, right = left[count:], right[count:]
