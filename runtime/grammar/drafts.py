"""Drafts under a grammar: tokens that are forced come first, and what the grammar forbids is not verified.

This changes which drafts are verified, never which tokens are chosen.
"""

from collections.abc import Callable, Sequence

import numpy as np

from runtime.drafters.base import NO_DRAFT, Draft, Drafter, Int64, ObservingDrafter, SlowDrafter, leads, name_of
from runtime.drafters.draft_head import HeadDrafter
from runtime.grammar.matcher import GrammarState


class ForcedTokens:
    """A drafter: the tokens that the grammar forces. They are sure to come."""

    name = "grammar"
    leads = True

    def __init__(self, grammar: GrammarState) -> None:
        self._grammar = grammar

    def propose(self, context: Int64, max_tokens: int) -> Draft:  # noqa: ARG002 - the form of `Drafter`
        """As `Drafter`."""
        forced = self._grammar.forced()[:max_tokens]
        return _chain(forced) if forced else NO_DRAFT

    def prior(self, evidence: int) -> float:  # noqa: ARG002 - all rest on the same
        """As a `Drafter` may have it."""
        return 1.0


class GuidedDrafter:
    """Another drafter's proposals: what it proposes after the forced tokens, as far as the grammar lets it through."""

    # Only where the drafter says something of itself: else the controller has its own belief.
    prior: Callable[[int], float]

    def __init__(self, drafter: Drafter, grammar: GrammarState) -> None:
        self._drafter, self._grammar = drafter, grammar
        self.name, self.leads = name_of(drafter), leads(drafter)
        prior = getattr(drafter, "prior", None)
        if prior is not None:
            self.prior = prior

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`."""
        forced = self._grammar.forced()[:max_tokens]
        if len(forced) == max_tokens:
            return _chain(forced)
        if forced:
            context = np.concatenate([context, np.array(forced, np.int64)])
        draft = self._drafter.propose(context, max_tokens - len(forced))
        if not is_draft(draft):
            # Whoever asked says what is wrong with it.
            return draft
        draft = self._grammar.prune(draft, after=forced)
        return _after(forced, draft) if forced else draft

    def observe(self, tokens: Int64, successors: Int64) -> None:
        """As `ObservingDrafter`."""
        if isinstance(self._drafter, ObservingDrafter):
            self._drafter.observe(tokens, successors)


class GuidedSlowDrafter(GuidedDrafter):
    """The same of a `SlowDrafter`."""

    def __init__(self, drafter: SlowDrafter, grammar: GrammarState) -> None:
        super().__init__(drafter, grammar)
        self._slow = drafter

    @property
    def seconds_per_token(self) -> float:
        """As `SlowDrafter`."""
        return self._slow.seconds_per_token


def guide(drafters: Sequence[Drafter], grammar: GrammarState) -> list[Drafter]:
    """These drafters under a grammar."""
    return [_guided(one, grammar) for one in drafters]


def is_draft(draft: Draft) -> bool:
    """Whether the arrays are those of a draft, parents before children; what else there is to check comes later."""
    tokens, parents = draft.tokens, draft.parents
    for array in (tokens, parents, draft.evidence):
        if array is not None and not (
            isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.shape == tokens.shape == (len(tokens),)
        ):
            return False
    return parents is None or bool(((parents >= -1) & (parents < np.arange(len(tokens)))).all())


def _guided(drafter: Drafter, grammar: GrammarState) -> Drafter:
    if isinstance(drafter, HeadDrafter):
        # Its tree is grown step by step, and asks as it grows.
        drafter.follow(grammar)
        return drafter
    return GuidedSlowDrafter(drafter, grammar) if isinstance(drafter, SlowDrafter) else GuidedDrafter(drafter, grammar)


def _chain(tokens: list[int]) -> Draft:
    return Draft(tokens=np.array(tokens, np.int64), evidence=np.zeros(len(tokens), np.int64))


def _after(forced: list[int], draft: Draft) -> Draft:
    """A draft that begins with the forced tokens; what its own tokens rest on is what it was."""
    count, first = len(draft.tokens), len(forced)
    evidence = _depths(draft) if draft.evidence is None else draft.evidence
    parents = None
    if draft.parents is not None:
        # What followed the pending token follows the last forced one: -1 becomes first - 1.
        parents = np.concatenate([np.arange(-1, first - 1, dtype=np.int64), draft.parents + first])
    return Draft(
        tokens=np.concatenate([np.array(forced, np.int64), draft.tokens]) if count else np.array(forced, np.int64),
        parents=parents,
        evidence=np.concatenate([np.zeros(first, np.int64), evidence]),
    )


def _depths(draft: Draft) -> Int64:
    """What a token without evidence rests on: how many of the draft's tokens come before it on its path."""
    if draft.parents is None:
        return np.arange(len(draft.tokens), dtype=np.int64)
    depths = [-1] * (len(draft.tokens) + 1)
    for place, parent in enumerate(draft.parents.tolist()):
        depths[place] = depths[parent] + 1
    return np.array(depths[:-1], np.int64)
