"""The controller: every round, the drafts that bring most expected tokens per millisecond, or none."""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

from quasar.errors import FaultError
from runtime.control.asking import Asking, SequenceAsking
from runtime.control.candidates import NO_CANDIDATES, Candidates, Prepared, Selection, judged, merge, select, to_draft
from runtime.control.control import tell, tell_prompt
from runtime.control.estimates import Estimates, Prior, SequenceEstimates
from runtime.control.growth import HeadGains, Sprout, grow, kind_of_round
from runtime.control.latency import Latencies, LatencyModel, Threshold
from runtime.drafters.base import (
    NO_DRAFT,
    Draft,
    Drafter,
    Float32,
    Int64,
    ObservingDrafter,
    SlowDrafter,
    ask,
    leads,
    name_of,
)
from runtime.drafters.draft_head import HeadDrafter
from runtime.segment import NO_PROPOSAL, Outcome, Proposal

# What is believed of a drafter that says nothing; of a slow one, that it is worth its time.
_FIRST_PRIOR, _SLOW_PRIOR = 0.5, 0.8
# A drafter that never drafted here may be so many times as fast as it says: a build that shares the machine has
# recorded 83 ms for 20. It is tried for so many tokens where it would pay then; after that its own time decides.
_DOUBT, _TRIED = 4.0, 2
# Added to the last part of what a rate goes by, which says whether a second drafter proposed the same: a slow drafter
# had spoken. That one which is often right does not say so as well speaks against a guess.
_BESIDE_SLOW = 2
# Drafts of a slow drafter that lie deeper are as likely as those at this depth.
_DEEPEST = 15
# Tokens that fast drafters are asked for, at least.
_LEAST_REACH = 8
# Of the time that drafting takes, the newest round's share in what is expected, and the share that is forgotten in a
# round in which it was not asked: what was slow once is tried again, as what was wrong once is. After so many such
# rounds the newest one counts alone.
_NEWEST, _FORGOTTEN, _LONG_UNASKED = 0.1, 0.002, 32


class Knowledge:
    """What an engine's sequences have in common: acceptance rates, latencies, and the time that drafters take."""

    def __init__(self, latency: LatencyModel, *, clock: Callable[[], float] | None = None) -> None:
        """`clock`: seconds, for the time that drafting takes; None: this machine's."""
        self.latency = latency
        self.clock = time.perf_counter if clock is None else clock
        self.estimates = Estimates()
        # Drafter → seconds per token, of the slow ones.
        self.draft_seconds: dict[str, float] = {}
        self.head_gains = HeadGains()
        self.asking = Asking()


class Controller:
    """Asks fast drafters in every round, merges what they propose, and verifies what pays.

    A slow drafter is asked when the tokens it is expected to bring are worth its time, for as many as are; what it says
    is merged with the others' then.

    Rates are kept by drafter and by what a guess rests on (`Draft.evidence`); a guess that a second drafter proposes
    as well has a rate of its own. Guesses that were not verified are judged, too, as far as the sequence goes on along
    them: so nothing has to be tried out.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        knowledge: Knowledge,
        *,
        most: int,
        trees: bool,
        plain_width: int = 1,
    ) -> None:
        """`most`: drafts per round, at most. `trees`: are they exact here? `plain_width`: the narrowest pass."""
        self._heads = [one for one in drafters if isinstance(one, HeadDrafter)]
        self._slow: list[SlowDrafter] = [one for one in drafters if isinstance(one, SlowDrafter)]
        fast = [one for one in drafters if not isinstance(one, SlowDrafter | HeadDrafter)]
        leading = [one for one in fast if leads(one)]
        # In the order in which a guess of several is taken for one's: what an engine says, and what a head's confidence
        # says, is worth more than that a token came up before.
        self._drafters: list[Drafter] = [*leading, *self._slow, *self._heads, *(one for one in fast if not leads(one))]
        self._first_slow = len(leading)
        self._first_head = self._first_slow + len(self._slow)
        self._first_other = self._first_head + len(self._heads)
        self._has_fast = bool(fast or self._heads)
        self._observing = [one for one in drafters if isinstance(one, ObservingDrafter)]
        self._names = _unlike(self._drafters)
        self._slow_names = self._names[self._first_slow : self._first_head]
        self._knowledge, self._estimates = knowledge, SequenceEstimates(knowledge.estimates)
        self._most, self._trees, self._plain_width = most, trees, plain_width
        # What may be verified, and the same without what a slow drafter said.
        self._candidates: Candidates | None = None
        self._of_fast: Candidates | None = None
        # What each drafter said in this round.
        self._drafts: list[Draft] = []
        # Slow drafters that this sequence has asked: the first time an engine reads the whole prompt.
        self._begun: set[str] = set()
        # Rounds since they were asked.
        self._unasked = dict.fromkeys(self._slow_names, 0)
        # The slow drafter that was asked, by place, for how many tokens, and what it said, by itself.
        self._asked: tuple[int, int, Candidates] | None = None
        # Whether it pays to ask the fast drafters for a pass that is shared, and seconds that the latest asking took.
        self._asking = SequenceAsking(knowledge.asking)
        self._asking_seconds: float | None = None
        # How many tokens the fast drafters are asked for.
        self._reach = _LEAST_REACH

    def begin(self, prompt: Int64, first: int, successors: Int64 | None) -> None:  # noqa: ARG002 - the form of `Control`
        """As `Control`."""
        tell_prompt(self._observing, prompt, successors)

    def propose(self, context: Int64, most: int, cache_length: int) -> Proposal:
        """As `Control`."""
        most = min(most, self._most)
        candidates = self._ask(context, most)
        if candidates is None:
            return NO_PROPOSAL
        latency = self._knowledge.latency.of(cache_length).padded(self._plain_width)
        selection = select(candidates, self._probability, latency, most=most, tree=self._trees)
        if self._heads:
            selection, latency = self._with_heads(context, most, latency, selection)
        if self._slow:
            slow = self._propose_slow(context, most, latency, selection)
            if slow is not None:
                return slow
        return self._proposal(selection.chosen, tokens=selection.tokens, seconds=selection.seconds)

    def asks(self, threshold: Threshold) -> bool:
        """As `Control`."""
        return self._has_fast and self._most > 0 and self._asking.asks(threshold)

    def prepare(self, context: Int64, most: int, cache_length: int) -> Prepared | None:  # noqa: ARG002 - the form of `Control`
        """As `Control`: what the fast drafters propose. A slow one would hold up all sequences of the pass."""
        start = self._knowledge.clock()
        most = min(most, self._most)
        candidates = self._ask(context, most)
        self._asking_seconds = self._knowledge.clock() - start
        return Prepared(
            candidates=NO_CANDIDATES if candidates is None else candidates,
            probability=self._probability,
            most=most,
            tree=self._trees,
            sprouts=self._sprouts(context, most) if most > 0 else (),
            regrown=lambda: Prepared(
                candidates=self._merged(), probability=self._probability, most=most, tree=self._trees
            ),
        )

    def settle(self, chosen: Sequence[int], *, tokens: float, seconds: float, gain: float) -> Proposal:
        """As `Control`."""
        if self._candidates is not None:
            self._asking.gained(gain)
        return self._proposal(chosen, tokens=tokens, seconds=seconds)

    def _proposal(self, chosen: Sequence[int], *, tokens: float, seconds: float) -> Proposal:
        """The proposal of chosen candidates, and what is expected of the round."""
        candidates = self._candidates
        if candidates is None or not chosen:
            return Proposal(draft=NO_PROPOSAL.draft, expected_tokens=1.0, expected_seconds=seconds)
        sources = tuple(self._names[candidates.drafters[place]] for place in chosen)
        return Proposal(
            draft=to_draft(candidates, chosen),
            drafter="+".join(dict.fromkeys(sources)),
            sources=sources,
            expected_tokens=tokens,
            expected_seconds=seconds,
        )

    def _ask(self, context: Int64, most: int) -> Candidates | None:
        """The fast drafters' candidates; None where none can be verified."""
        self._candidates = self._of_fast = self._asked = None
        if most > 0:
            reach = min(most, self._reach)
            # Slow drafters and heads are asked later, if at all.
            later = range(self._first_slow, self._first_other)
            self._drafts = [
                NO_DRAFT if place in later else ask(one, context, reach, trees=self._trees)
                for place, one in enumerate(self._drafters)
            ]
            self._candidates = self._of_fast = merge(self._drafts)
        return self._candidates

    def _with_heads(
        self, context: Int64, most: int, latency: Latencies, plain: Selection
    ) -> tuple[Selection, Latencies]:
        """The selection where draft heads draft as well, if they are asked, and latencies with what they took.

        `plain`: the selection without them.
        """
        gains, kind = self._knowledge.head_gains, kind_of_round(plain.tokens)
        if not gains.asks(kind):
            return plain, latency
        start, spent = self._knowledge.clock(), 0.0
        for sprout in self._sprouts(context, most):
            spent += grow([sprout], latency)
        if not spent:
            return plain, latency
        # What the host does between steps counts as well.
        latency = latency.after(max(spent, self._knowledge.clock() - start))
        selection = select(self._merged(), self._probability, latency, most=most, tree=self._trees)
        caught_up = any(head.caught_up for head in self._heads)
        gains.count(kind, with_head=selection, without=plain, caught_up=caught_up)
        return selection, latency

    def _sprouts(self, context: Int64, most: int) -> tuple[Sprout, ...]:
        """The trees of draft heads, which are to be grown."""
        return tuple(
            Sprout(head=head, context=context, rate=partial(self._head_rate, place), most=most)
            for place, head in enumerate(self._heads)
        )

    def _head_rate(self, place: int, evidence: int) -> float:
        """How often a head's guesses with this evidence are right, where no other drafter makes them as well."""

        def prior() -> float:
            return self._heads[place].prior(evidence)

        return self._estimates.rate((self._names[self._first_head + place], evidence, False), prior)

    def _merged(self) -> Candidates:
        """The candidates of all, with the heads' trees as they are now."""
        self._drafts[self._first_head : self._first_other] = [head.draft() for head in self._heads]
        self._candidates = self._of_fast = merge(self._drafts)
        return self._candidates

    def see(self, tokens: Int64, first: int, hidden_states: Sequence[Float32]) -> None:
        """As `Control`."""
        for head in self._heads:
            head.see(tokens, first, hidden_states)

    def learn(self, outcome: Outcome) -> None:
        """As `Control`."""
        if outcome.seconds:
            self._knowledge.latency.correct(outcome.segment.cache_length, len(outcome.segment.tokens), outcome.seconds)
        if self._candidates is not None:
            start = self._knowledge.clock()
            emitted = outcome.tokens.tolist()
            for candidates in _different(self._of_fast, self._candidates):
                for place, right in judged(candidates, emitted):
                    self._estimates.count(*self._key(candidates, place), right=right)
            if self._asking_seconds is not None:
                self._asking.took(self._asking_seconds + self._knowledge.clock() - start)
        if self._asked is not None:
            index, count, said = self._asked
            drafter, name = self._slow[index], self._slow_names[index]
            branches = len(said.children[-1]) > 1
            at = -1
            for depth, token in enumerate(outcome.tokens[:count].tolist()):
                # A token that was asked for and not proposed is none that is right.
                after = [place for place in said.children[at] if said.tokens[place] == token]
                # Of a tree, which is not as deep as it is large, only what was proposed.
                if after or said.children[at] or not branches:
                    self._estimates.count(*_depth_key(drafter, name, depth), right=bool(after))
                if not after:
                    break
                at = after[0]
        # The next pass may come without asking.
        self._candidates = self._of_fast = self._asked = self._asking_seconds = None
        tell(self._observing, outcome)
        # Drafts grow with what is accepted: looking at 31 tokens in every round takes longer than it saves.
        self._reach = max(_LEAST_REACH, 2 * len(outcome.tokens) + _LEAST_REACH // 2)

    def _probability(self, place: int) -> float:
        candidates = self._candidates
        assert candidates is not None
        return self._estimates.rate(*self._key(candidates, place))

    def _key(self, candidates: Candidates, place: int) -> tuple[Hashable, Prior]:
        """What a candidate's rate goes by, and what is believed of it before any was seen."""
        drafter, evidence = candidates.drafters[place], candidates.evidence[place]
        if self._first_slow <= drafter < self._first_head:
            evidence, first = min(evidence, _DEEPEST), _SLOW_PRIOR
        else:
            first = _FIRST_PRIOR
        seconded = candidates.seconded[place]

        def prior() -> float:
            alone = _prior_of(self._drafters[drafter], evidence, first)
            # Half of the wrong guesses would not be made by two.
            return (1 + alone) / 2 if seconded else alone

        said = seconded if candidates is self._of_fast else _BESIDE_SLOW + seconded
        return (self._names[drafter], evidence, said), prior

    def _propose_slow(self, context: Int64, most: int, latency: Latencies, fast: Selection) -> Proposal | None:
        """The selection with a slow drafter's draft, where that is expected to bring more per second than `fast`."""
        seconds = latency.seconds
        best = self._best_slow(most, seconds, fast.tokens / fast.seconds)
        if best is None:
            best = self._best_slow(min(most, _TRIED), seconds, fast.tokens / fast.seconds, untried=True)
        for index, (drafter, name) in enumerate(zip(self._slow, self._slow_names, strict=True)):
            if best is None or index != best[0]:
                self._forget(drafter, name, most)
        if best is None:
            return None
        index, count = best
        drafter, name = self._slow[index], self._slow_names[index]
        start = self._knowledge.clock()
        draft = ask(drafter, context, count, trees=self._trees)
        took_here = self._knowledge.clock() - start
        if not len(draft.tokens) and math.isinf(drafter.seconds_per_token):
            return None
        # The first time it may have read the whole prompt.
        spent = took_here if name in self._begun else count * self._seconds_of(drafter, name)
        if name in self._begun:
            self._time(name, took_here / count)
        self._begun.add(name)
        self._unasked[name] = 0
        self._asked = (index, count, merge([draft]))
        if not len(draft.tokens):
            return None
        # By depth, whatever the drafter says its guesses rest on.
        self._drafts[self._first_slow + index] = replace(draft, evidence=None)
        self._candidates = merge(self._drafts)
        after = latency.after(spent)
        selection = select(self._candidates, self._probability, after, most=most, tree=self._trees)
        return self._proposal(selection.chosen, tokens=selection.tokens, seconds=selection.seconds)

    def _best_slow(
        self, most: int, seconds: Sequence[float], rate: float, *, untried: bool = False
    ) -> tuple[int, int] | None:
        """Drafter, and tokens to ask for, of what beats a rate; None where nothing does.

        `untried`: of those that never drafted here, as if they were faster than they say.
        """
        best = None
        for index, (drafter, name) in enumerate(zip(self._slow, self._slow_names, strict=True)):
            each = self._seconds_of(drafter, name)
            if math.isinf(each) or (untried and name in self._knowledge.draft_seconds):
                continue
            reached = expected = 1.0
            for count in range(1, most + 1):
                reached *= self._estimates.rate(*_depth_key(drafter, name, count - 1))
                expected += reached
                hoped = seconds[count] + count * each / (_DOUBT if untried else 1.0)
                if expected / hoped > rate:
                    rate, best = expected / hoped, (index, count)
        return best

    def _seconds_of(self, drafter: SlowDrafter, name: str) -> float:
        """Per token: as seen here, or as it says itself; infinite where it drafts no more in this sequence."""
        says = drafter.seconds_per_token
        return says if math.isinf(says) else self._knowledge.draft_seconds.get(name, says)

    def _forget(self, drafter: SlowDrafter, name: str, most: int) -> None:
        """What is known of a drafter that was not asked goes back to what it says of itself, little by little."""
        for depth in range(min(most, _DEEPEST + 1)):
            self._knowledge.estimates.fade(*_depth_key(drafter, name, depth))
        self._unasked[name] += 1
        known, says = self._knowledge.draft_seconds, drafter.seconds_per_token
        if name in known and not math.isinf(says):
            known[name] += _FORGOTTEN * (says - known[name])

    def _time(self, name: str, seconds: float) -> None:
        known = self._knowledge.draft_seconds
        share = _NEWEST if self._unasked[name] < _LONG_UNASKED else 1.0
        known[name] = seconds if name not in known else known[name] + share * (seconds - known[name])


def _different(of_fast: Candidates | None, merged: Candidates) -> tuple[Candidates, ...]:
    """Both where a slow drafter spoke: what the others' guesses are worth without it is learnt there, too."""
    return (merged,) if of_fast is None or of_fast is merged else (of_fast, merged)


def _unlike(drafters: Sequence[Drafter]) -> list[str]:
    """Their names, a number after those that came before."""
    names: list[str] = []
    for drafter in drafters:
        name, number = name_of(drafter), 2
        while name in names:
            name, number = f"{name_of(drafter)} {number}", number + 1
        names.append(name)
    return names


def _prior_of(drafter: Drafter, evidence: int, otherwise: float) -> float:
    """What a drafter says of itself, if it does. Raises `FaultError` where that is no probability."""
    says = getattr(drafter, "prior", None)
    if says is None:
        return otherwise
    said = float(says(evidence))
    if not 0 <= said <= 1:
        # It would be weighed against other sequences' drafts, and stay in what all of them learn.
        raise FaultError(f"drafter {name_of(drafter)!r} gives its guesses the prior {said}; 0 to 1 was expected")
    return said


def _depth_key(drafter: Drafter, name: str, depth: int) -> tuple[Hashable, Prior]:
    """What a slow drafter's rate goes by: how many tokens it drafted before."""
    depth = min(depth, _DEEPEST)
    return (name, depth, False), lambda: _prior_of(drafter, depth, _SLOW_PRIOR)
