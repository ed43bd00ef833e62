"""The tokens that a draft head can draft: those that the verifier finds likely, by its own account."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.draft_heads.data_folder import GeneratedSequence

# Of the verifier's probability, over all answers, so much is of tokens that can be drafted.
COVERAGE = 0.985
LEAST_TOKENS, MOST_TOKENS = 4096, 32000
# Rows of the LM head come in so many.
_MULTIPLE = 64
# Below it, a token was only among the unlikely ones.
_LEAST_MASS = 0.02
# Vocabularies with more special tokens than that reserve most of them.
_MOST_SPECIALS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftVocabulary:
    """Tokens int64 [N], ascending; `coverage`: the share of the verifier's probability that is theirs."""

    tokens: NDArray[np.int64]
    coverage: float


def token_masses(sequences: Iterable[GeneratedSequence], vocab_size: int) -> NDArray[np.float64]:
    """The verifier's probability of each token, summed over positions: float64 [V]."""
    masses = np.zeros(vocab_size)
    for sequence in sequences:
        shares = np.exp(sequence.log_probabilities.astype(np.float32)).ravel()
        masses += np.bincount(sequence.likely.ravel(), shares, vocab_size)
    return masses


def choose_vocabulary(
    parts: Sequence[NDArray[np.float64]], *, always: Collection[int], size: int | None = None
) -> DraftVocabulary:
    """The tokens that the verifier finds likeliest.

    What was seen of a little text covers less of the next one: of the text's parts, each is covered by the tokens that
    the others name, and the mean says how many are needed. Tokens that no part names follow by their ids, since those
    of most vocabularies are in order of frequency.

    Args:
        parts: the masses float64 [V] (`token_masses`) of parts of the text.
        always: tokens that are in, such as those that end a text; where they are many, those that occur.
        size: how many tokens; None takes as many as `COVERAGE` needs, 4096 to 32000.
    """
    masses: NDArray[np.float64] = np.sum(parts, axis=0)
    kept = sorted(set(always))
    if len(kept) > _MOST_SPECIALS:
        kept = [token for token in kept if masses[token] > 0]
    if size is None:
        size = min(max(_size_for(parts), LEAST_TOKENS), MOST_TOKENS)
    size = min(-(-max(size, len(kept)) // _MULTIPLE) * _MULTIPLE, len(masses))
    order = _ranked(masses)
    rest = order[~np.isin(order, kept)]
    tokens = np.sort(np.concatenate([np.asarray(kept, np.int64), rest[: size - len(kept)]]).astype(np.int64))
    return DraftVocabulary(tokens=tokens, coverage=coverage_of(masses, tokens))


def _size_for(parts: Sequence[NDArray[np.float64]]) -> int:
    """The least size whose mean coverage of parts, ranked by the other parts, is `COVERAGE`."""
    total = np.sum(parts, axis=0)
    curves = []
    for part in parts:
        others = total - part if len(parts) > 1 else total
        curves.append(np.cumsum(part[_ranked(others)]) / max(float(part.sum()), 1e-300))
    return int(np.searchsorted(np.mean(curves, axis=0), COVERAGE)) + 1


def _ranked(masses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Tokens by mass; those of next to none by id."""
    seen = np.where(masses < _LEAST_MASS, 0.0, masses)
    order: NDArray[np.int64] = np.argsort(-seen, kind="stable")
    return order


def coverage_of(masses: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    """The share of all masses that is of some tokens."""
    total = float(masses.sum())
    return float(masses[tokens].sum()) / total if total else 0.0
