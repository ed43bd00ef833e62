"""Prompt lookup: what followed the last n-gram when it stood in the context before (Saxena, prompt-lookup-decoding)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from quasar.errors import GenerationError
from runtime.drafters.base import NO_DRAFT, Draft, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLookup:
    """Matches the longest n-gram from `max_ngram` down to `min_ngram` words of the context's end.

    `match` "latest" takes the most recent earlier place and, where what follows it runs into the end of the
    context, goes on copying from the draft itself (a loop of period p is drafted as one). "earliest" takes the
    first place and repeats the context's last token past its end, as vLLM's first n-gram proposer did.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    match: Literal["latest", "earliest"] = "latest"

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise GenerationError(
                f"min_ngram is {self.min_ngram}, max_ngram {self.max_ngram}; 1 <= min_ngram <= max_ngram was expected"
            )

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """The continuation of the matching place, exactly `max_tokens` long, or no draft at all."""
        if max_tokens <= 0:
            return NO_DRAFT
        for size in range(min(self.max_ngram, len(context) - 1), self.min_ngram - 1, -1):
            follower = find_ngram(context, size, latest=self.match == "latest")
            if follower is not None:
                offsets = np.arange(max_tokens)
                if self.match == "latest":
                    return Draft(tokens=context[follower + offsets % (len(context) - follower)])
                return Draft(tokens=context[np.minimum(follower + offsets, len(context) - 1)])
        return NO_DRAFT


def find_ngram(context: Int64, size: int, *, latest: bool) -> int | None:
    """Index of the token after an earlier occurrence of the context's last `size` tokens, or None."""
    length = len(context)
    ends = np.flatnonzero(context[size - 1 : length - 1] == context[-1]) + size - 1
    for back in range(1, size):
        ends = ends[context[ends - back] == context[length - 1 - back]]
    if not len(ends):
        return None
    return int(ends[-1 if latest else 0]) + 1
