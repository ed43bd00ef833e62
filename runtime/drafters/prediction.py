"""Prediction: drafts from a text that the answer will resemble, as a file resembles its edited form."""

from dataclasses import dataclass

import numpy as np

from runtime.drafters.alignment import Alignment, Relation
from runtime.drafters.base import NO_DRAFT, Draft, Int64

# Matches of so many tokens and more, up to the next bound, are taken together in what a guess rests on.
_LENGTH_BOUNDS = np.array((1, 2, 3, 4, 6, 9, 17, 33))
_LENGTHS = len(_LENGTH_BOUNDS) + 1
# The same for how well the answer followed lately.
_RECENT_BOUNDS = (0.75, 0.93)
_RECENT = len(_RECENT_BOUNDS) + 1
_RECENT_PRIORS = (0.85, 0.98, 1.0)
_PRIORS = {
    Relation.FOLLOWED: (0.8, 0.82, 0.85, 0.88, 0.91, 0.93, 0.95, 0.97, 0.98),
    Relation.NEAR: (0.2, 0.45, 0.6, 0.75, 0.85, 0.9, 0.94, 0.96, 0.97),
    Relation.ELSEWHERE: (0.05, 0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95, 0.96),
    Relation.GUESSED: (0.3, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.97),
    # By the token of the replacement.
    Relation.REPLACED: (0.6, 0.9, 0.93, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95),
}
# A second chain of a tree is so long at most, and at most a third of the draft.
_SIDE_TOKENS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedAnswer:
    """What an answer will resemble: `tokens` int64 [n]; the answer begins after so many tokens of the context."""

    tokens: Int64
    begins: int


class Prediction:
    """Copies what the prediction has after the place where the answer stands in it (`Alignment`).

    On engines with exact trees a second chain stands for the second likeliest place, or for what the prediction has
    where a replacement is expected. One object follows one sequence.
    """

    name = "prediction"
    leads = True

    def __init__(self, predicted: PredictedAnswer, *, trees: bool = False) -> None:
        self._predicted, self._trees = predicted, trees
        self._alignment = Alignment(predicted.tokens)
        # Tokens of the context that the alignment has seen, or that are the prompt's.
        self._read = predicted.begins

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`."""
        if max_tokens <= 0 or not len(self._predicted.tokens):
            return NO_DRAFT
        if len(context) < self._read:
            self._alignment, self._read = Alignment(self._predicted.tokens), self._predicted.begins
        for token in context[self._read :].tolist():
            self._alignment.push(token)
        self._read = max(self._read, len(context))
        recent = int(np.searchsorted(_RECENT_BOUNDS, self._alignment.recent, side="right"))
        chains = self._chains(max_tokens, recent)
        if not chains:
            return NO_DRAFT
        (tokens, evidence, _), *others = chains
        if not others:
            return Draft(tokens=np.array(tokens, np.int64), evidence=np.array(evidence, np.int64))
        parents = list(range(-1, len(tokens) - 1))
        for more, rests_on, after in others:
            parents += [after, *range(len(tokens), len(tokens) + len(more) - 1)]
            tokens, evidence = tokens + more, evidence + rests_on
        return Draft(
            tokens=np.array(tokens, np.int64),
            parents=np.array(parents, np.int64),
            evidence=np.array(evidence, np.int64),
        )

    def prior(self, evidence: int) -> float:
        """The probability of a guess, before any was seen."""
        kind, length = divmod(evidence, _LENGTHS)
        relation, recent = divmod(kind, _RECENT)
        return _PRIORS[Relation(relation)][length] * _RECENT_PRIORS[recent]

    def _chains(self, max_tokens: int, recent: int) -> list[tuple[list[int], list[int], int]]:
        """Tokens of each chain, what they rest on, and the place in the draft that it follows (-1: the pending token).

        The likeliest first; without trees that one alone.
        """
        alignment = self._alignment
        places = sorted(
            alignment.places(),
            key=lambda place: -_PRIORS[place.relation][int(_length_kinds(place.length, 1)[0])],
        )
        side = min(_SIDE_TOKENS, max_tokens // 3) if self._trees else 0
        for index, place in enumerate(places):
            tokens, replacing, positions = alignment.ahead(place, max_tokens)
            if not tokens:
                continue
            evidence = _evidence(place.relation, recent, place.length, replacing)
            if not side:
                return [(tokens, evidence, -1)]
            # Another place that goes on with another token; else the prediction's own words for what is replaced.
            for other in places[index + 1 :]:
                more, kinds, _ = alignment.ahead(other, side)
                if more and more[0] != tokens[0]:
                    rests_on = _evidence(other.relation, recent, other.length, kinds)
                    return [
                        (tokens[: max_tokens - len(more)], evidence[: max_tokens - len(more)], -1),
                        (more, rests_on, -1),
                    ]
            if 0 in replacing[: max_tokens - side]:
                at = replacing.index(0)
                more = alignment.unedited(positions[at], side)
                kept = max_tokens - len(more)
                rests_on = _evidence(Relation.GUESSED, recent, 0, [-1] * len(more))
                return [(tokens[:kept], evidence[:kept], -1), (more, rests_on, at - 1)]
            return [(tokens, evidence, -1)]
        return []


def _length_kinds(length: int, count: int) -> Int64:
    """By how long the match is before each of so many copied tokens: int64 [count]."""
    kinds: Int64 = np.searchsorted(_LENGTH_BOUNDS, length + np.arange(count), side="right")
    return kinds


def _evidence(relation: Relation, recent: int, length: int, replacing: list[int]) -> list[int]:
    """What the tokens of a copy rest on."""
    copied = (relation * _RECENT + recent) * _LENGTHS
    replaced = (Relation.REPLACED * _RECENT + recent) * _LENGTHS
    kinds = _length_kinds(length, len(replacing)).tolist()
    return [
        copied + kind if index < 0 else replaced + min(index, _LENGTHS - 1)
        for kind, index in zip(kinds, replacing, strict=True)
    ]
