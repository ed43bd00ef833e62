"""One drafter that drafts the same number of tokens every round, whatever that takes and brings."""

from collections.abc import Sequence

from runtime.control.control import AloneControl, tell, tell_prompt
from runtime.drafters.base import Drafter, Float32, GrowingDrafter, Int64, ObservingDrafter, ask, name_of
from runtime.segment import NO_PROPOSAL, Outcome, Proposal


class FixedControl(AloneControl):
    """At most `num_draft_tokens` of one drafter's tokens in every round."""

    def __init__(self, drafter: Drafter, num_draft_tokens: int, *, trees: bool = False) -> None:
        """`trees`: whether they are exact on this engine."""
        self._drafter, self._count, self._trees = drafter, num_draft_tokens, trees
        self._observing = [drafter] if isinstance(drafter, ObservingDrafter) else []

    def begin(self, prompt: Int64, first: int, successors: Int64 | None) -> None:  # noqa: ARG002 - the form of `Control`
        """As `Control`."""
        tell_prompt(self._observing, prompt, successors)

    def propose(self, context: Int64, most: int, cache_length: int) -> Proposal:  # noqa: ARG002 - the form of `Control`
        """As `Control`."""
        wanted = min(most, self._count)
        if wanted <= 0:
            return NO_PROPOSAL
        draft = ask(self._drafter, context, wanted, trees=self._trees)
        if not len(draft.tokens):
            return NO_PROPOSAL
        name = name_of(self._drafter)
        return Proposal(draft=draft, drafter=name, sources=(name,) * len(draft.tokens))

    def see(self, tokens: Int64, first: int, hidden_states: Sequence[Float32]) -> None:
        """As `Control`."""
        if isinstance(self._drafter, GrowingDrafter):
            self._drafter.see(tokens, first, hidden_states)

    def learn(self, outcome: Outcome) -> None:
        """As `Control`."""
        tell(self._observing, outcome)
