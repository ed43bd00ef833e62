"""What is proposed to an engine that drafts: a copy of the context, or what another drafter has."""

from runtime.drafters.base import Draft, Drafter, Int64, ObservingDrafter
from runtime.drafters.prompt_lookup import PromptLookup


class InnerDrafts:
    """For one sequence of `hierarchical:DIR`: prompt lookup where it finds a match, else the other drafter."""

    def __init__(self, otherwise: Drafter) -> None:
        """`otherwise`: token recycling, or a smaller engine."""
        self._lookup, self._otherwise = PromptLookup(), otherwise

    def observe(self, tokens: Int64, successors: Int64) -> None:
        """As `ObservingDrafter`."""
        if isinstance(self._otherwise, ObservingDrafter):
            self._otherwise.observe(tokens, successors)

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`."""
        draft = self._lookup.propose(context, max_tokens)
        return draft if len(draft.tokens) else self._otherwise.propose(context, max_tokens)
