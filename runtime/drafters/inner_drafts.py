"""What is proposed to an engine that drafts: a copy of the context, or a tree of what it held likeliest before."""

from collections.abc import Mapping, Sequence

from runtime.drafters.base import Draft, Int64
from runtime.drafters.prompt_lookup import PromptLookup
from runtime.drafters.recycling import Recycling

# Branches of a tree: with few drafts, more are never taken.
_BRANCHES = 3


class InnerDrafts:
    """For one sequence of `hierarchical:DIR`: prompt lookup where it finds a match, else token recycling."""

    def __init__(self, *, trees: bool, warm: Mapping[int, Sequence[int]]) -> None:
        """`trees`: the engine's passes take them; `warm`: token → successors from other sequences (`Recycling`)."""
        self._lookup = PromptLookup()
        self._recycling = Recycling(branches=_BRANCHES if trees else 1, warm=warm)

    def observe(self, tokens: Int64, successors: Int64) -> None:
        """As `ObservingDrafter`."""
        self._recycling.observe(tokens, successors)

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`."""
        draft = self._lookup.propose(context, max_tokens)
        return draft if len(draft.tokens) else self._recycling.propose(context, max_tokens)
