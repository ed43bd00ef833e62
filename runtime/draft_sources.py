"""Which drafter's drafts were verified, and how many of them were accepted."""

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.acceptance import follow
from runtime.segment import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCount:
    """Drafts of one drafter: those that were verified, and those of them that were accepted.

    A draft that several drafters proposed counts for the first of them.
    """

    drafter: str
    drafted: int
    accepted: int


def count_sources(outcome: Outcome) -> tuple[SourceCount, ...]:
    """What a pass says of each drafter whose drafts it held."""
    proposal = outcome.segment.proposal
    if not proposal.sources:
        return ()
    accepted = [place - 1 for place in outcome.path[1:]]
    if outcome.accepted > len(accepted):
        # The sequence ended with a draft, after which nothing was chosen.
        step = follow(proposal.draft.tokens, proposal.draft.parents)
        last = step(outcome.path[-1], int(outcome.tokens[-1]))
        assert last is not None
        accepted.append(last - 1)
    right = [proposal.sources[place] for place in accepted]
    return tuple(
        SourceCount(drafter=name, drafted=proposal.sources.count(name), accepted=right.count(name))
        for name in dict.fromkeys(proposal.sources)
    )


def total(counts: Iterable[SourceCount]) -> tuple[SourceCount, ...]:
    """The sums by drafter, those of which most were accepted first."""
    drafted: dict[str, int] = {}
    accepted: dict[str, int] = {}
    for one in counts:
        drafted[one.drafter] = drafted.get(one.drafter, 0) + one.drafted
        accepted[one.drafter] = accepted.get(one.drafter, 0) + one.accepted
    found = [SourceCount(drafter=name, drafted=drafted[name], accepted=accepted[name]) for name in drafted]
    return tuple(sorted(found, key=lambda one: -one.accepted))
