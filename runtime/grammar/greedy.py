"""The likeliest token that a grammar allows."""

import numpy as np
from numpy.typing import NDArray

from plugins.sample_token import check_largest
from runtime.grammar.matcher import GrammarState
from runtime.sampling.logprobs import TokenLogprob
from runtime.segment import Targets

Int64 = NDArray[np.int64]


class GreedyGrammarChooser:
    """A `TokenChooser`: the first of the graph's likeliest tokens that may come; logits only where none of them may.

    Tokens that are not among the likeliest are less likely than those, so it is the token that a mask over all logits
    would leave: asking for single tokens takes a fifth of the time of a mask.
    """

    wants_logits = True

    def __init__(self, grammar: GrammarState) -> None:
        self._grammar = grammar

    def choose(self, targets: Targets, place: int, context: Int64) -> int:  # noqa: ARG002 - the form of `TokenChooser`
        """As `TokenChooser`."""
        token = self._find(targets, place)
        self._grammar.take(token)
        return token

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """As `TokenChooser`."""
        return ()

    def _find(self, targets: Targets, place: int) -> int:
        if forced := self._grammar.forced():
            return forced[0]
        if targets.successors is not None:
            for token in targets.successors[place].tolist():
                if self._grammar.allows(token):
                    return int(token)
        assert targets.logits is not None
        row = targets.logits[place]
        self._grammar.mask(row)
        token = int(row.argmax())
        check_largest(float(row[token]))
        return token
