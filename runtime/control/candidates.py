"""Drafts of several drafters as one tree of candidates, and the part of it that is worth verifying (pure functions)."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.control.growth import Sprout
from runtime.control.latency import Latencies
from runtime.drafters.base import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Tokens, each with the candidate that it follows (-1: the pending token), which comes before it.

    `drafters`, `evidence`: the first drafter that proposed it, by place, and what it rests on there. `seconded`:
    another drafter proposed it, too. `children`: of each candidate, and last (index -1) of the pending token.
    """

    tokens: list[int]
    parents: list[int]
    drafters: list[int]
    evidence: list[int]
    seconded: list[bool]
    children: list[list[int]]


def merge(drafts: Sequence[Draft]) -> Candidates:
    """The union of drafts: tokens with the same path are one candidate. A token without evidence rests on its depth."""
    tokens: list[int] = []
    parents: list[int] = []
    drafters: list[int] = []
    evidence: list[int] = []
    seconded: list[bool] = []
    depths = [-1]
    children: list[list[int]] = [[]]
    found: dict[tuple[int, int], int] = {}
    for drafter, draft in enumerate(drafts):
        count = len(draft.tokens)
        above = range(-1, count - 1) if draft.parents is None else draft.parents.tolist()
        rests_on = None if draft.evidence is None else draft.evidence.tolist()
        # The candidate that each of the draft's tokens is; last (index -1) that of the pending token.
        places = [-1] * (count + 1)
        for index, token in enumerate(draft.tokens.tolist()):
            parent = places[above[index]]
            place = found.get((parent, token))
            if place is None:
                place = found[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                drafters.append(drafter)
                depth = depths[parent] + 1
                depths.insert(place, depth)
                evidence.append(depth if rests_on is None else rests_on[index])
                seconded.append(False)
                children.insert(place, [])
                children[parent].append(place)
            elif drafters[place] != drafter:
                seconded[place] = True
            places[index] = place
    return Candidates(
        tokens=tokens,
        parents=parents,
        drafters=drafters,
        evidence=evidence,
        seconded=seconded,
        children=children,
    )


NO_CANDIDATES = merge([])


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Candidates to verify, parents first, with the tokens and seconds that the round is expected to bring and take."""

    chosen: list[int]
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds


def select(
    candidates: Candidates,
    probability: Callable[[int], float],
    latency: Latencies,
    *,
    most: int,
    tree: bool,
) -> Selection:
    """The candidates whose verification brings most tokens per second; none where plain decoding does.

    Likeliest first, so every prefix of the order is the best choice of its size (EAGLE-2, section 4.2, with observed
    rates in place of a drafter's own confidence); the size is the one with most tokens per second.

    Args:
        probability: of a candidate, given that what it follows was right.
        latency: of a round.
        most: drafts, at most.
        tree: whether siblings may be verified; else the best chain.
    """
    seconds, least_ahead = latency.seconds, latency.least_ahead
    most = min(most, len(seconds) - 1)
    if not tree:
        return _best_chain(candidates, probability, seconds, most)
    queue = [(-probability(place), place) for place in candidates.children[-1]]
    heapq.heapify(queue)
    chosen: list[int] = []
    expected = 1.0
    best = Selection(chosen=[], tokens=1.0, seconds=seconds[0])
    best_rate = 1.0 / seconds[0]
    while queue and len(chosen) < most:
        negative, place = heapq.heappop(queue)
        # What is left is no likelier, and every draft takes at least so long: the rate cannot rise any more.
        if -negative <= best_rate * least_ahead[len(chosen)]:
            break
        chosen.append(place)
        expected -= negative
        rate = expected / seconds[len(chosen)]
        if rate > best_rate:
            best_rate = rate
            best = Selection(chosen=chosen.copy(), tokens=expected, seconds=seconds[len(chosen)])
        for child in candidates.children[place]:
            heapq.heappush(queue, (negative * probability(child), child))
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One sequence's candidates for a pass that others share.

    `probability` of a candidate, given that what it follows was right. `most`: drafts, at most. `tree`: whether
    siblings may be verified. `sprouts`: trees of draft heads that are not grown yet; `regrown`: the same
    with the trees as they are then.
    """

    candidates: Candidates
    probability: Callable[[int], float]
    most: int
    tree: bool
    sprouts: tuple[Sprout, ...] = ()
    regrown: "Callable[[], Prepared] | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSelection:
    """The candidates of each sequence to verify in one pass, parents first, with what the pass will bring and take.

    `tokens`: expected of each sequence. `seconds`: of the pass. `gains`: the seconds that each sequence's drafts save,
    against bringing their tokens in passes without drafts.
    """

    chosen: list[list[int]]
    tokens: list[float]
    seconds: float
    gains: list[float]

    @property
    def rate(self) -> float:
        """Expected tokens per second, of these sequences."""
        return sum(self.tokens) / self.seconds


NO_SELECTION = JointSelection(chosen=[], tokens=[], seconds=0.0, gains=[])


def select_jointly(parts: Sequence[Prepared], latency: Latencies, *, others: float = 0.0) -> JointSelection:
    """The candidates of all sequences whose verification brings most tokens per second.

    They compete: the likeliest is taken first, wherever it comes from, as long as that raises the tokens per second of
    the pass. So every draft has to be likelier, the more sequences there are.

    Args:
        latency: of the pass, by the number of its drafts.
        others: tokens that the pass brings besides: of sequences that draft nothing.
    """
    seconds, least_ahead = latency.seconds, latency.least_ahead
    queue = [
        (-part.probability(place), index, place)
        for index, part in enumerate(parts)
        for place in part.candidates.children[-1]
    ]
    heapq.heapify(queue)
    most = len(seconds) - 1
    taken: list[tuple[int, int, float]] = []
    counts = [0] * len(parts)
    # The last candidate of each chain: siblings of what is on it are left out.
    ends = [-1] * len(parts)
    expected = others + len(parts)
    best, best_rate = 0, expected / seconds[0]
    while queue and len(taken) < most:
        negative, index, place = heapq.heappop(queue)
        if -negative <= best_rate * least_ahead[len(taken)]:
            break
        part = parts[index]
        if counts[index] == part.most or not (part.tree or part.candidates.parents[place] == ends[index]):
            continue
        counts[index] += 1
        ends[index] = place
        taken.append((index, place, -negative))
        expected -= negative
        rate = expected / seconds[len(taken)]
        if rate > best_rate:
            best, best_rate = len(taken), rate
        for child in part.candidates.children[place]:
            heapq.heappush(queue, (negative * part.probability(child), index, child))
    chosen: list[list[int]] = [[] for _ in parts]
    tokens = [1.0] * len(parts)
    for index, place, probability in taken[:best]:
        chosen[index].append(place)
        tokens[index] += probability
    token_seconds = seconds[0] / (others + len(parts)) if parts else 0.0
    draft_seconds = (seconds[best] - seconds[0]) / max(1, best)
    gains = [
        (brought - 1.0) * token_seconds - len(places) * draft_seconds
        for brought, places in zip(tokens, chosen, strict=True)
    ]
    return JointSelection(chosen=chosen, tokens=tokens, seconds=seconds[best], gains=gains)


def _best_chain(
    candidates: Candidates, probability: Callable[[int], float], seconds: Sequence[float], most: int
) -> Selection:
    best = Selection(chosen=[], tokens=1.0, seconds=seconds[0])
    # Of each candidate, and last (index -1) of the pending token: drafts up to it, tokens expected, reached how often.
    reached: list[tuple[int, float, float]] = [(0, 1.0, 1.0)]
    last = -1
    for place, parent in enumerate(candidates.parents):
        count, expected, path = reached[parent]
        if count < most:
            path *= probability(place)
            expected += path
        reached.insert(place, (count + 1, expected, path))
        if count < most and expected * best.seconds > best.tokens * seconds[count + 1]:
            last, best = place, Selection(chosen=[], tokens=expected, seconds=seconds[count + 1])
    while last != -1:
        best.chosen.insert(0, last)
        last = candidates.parents[last]
    return best


def to_draft(candidates: Candidates, chosen: Sequence[int]) -> Draft:
    """The chosen candidates as a draft; a chain has no parents."""
    new_place = {-1: -1} | {place: new for new, place in enumerate(chosen)}
    parents = [new_place[candidates.parents[place]] for place in chosen]
    chain = all(parent == place - 1 for place, parent in enumerate(parents))
    return Draft(
        tokens=np.array([candidates.tokens[place] for place in chosen], np.int64),
        parents=None if chain else np.array(parents, np.int64),
    )


def judged(candidates: Candidates, emitted: Sequence[int]) -> list[tuple[int, bool]]:
    """Every candidate that the emitted tokens decide about, verified or not, and whether it was right."""
    verdicts: list[tuple[int, bool]] = []
    path: int | None = -1
    for token in emitted:
        if path is None:
            break
        after = None
        for place in candidates.children[path]:
            right = candidates.tokens[place] == token
            verdicts.append((place, right))
            if right:
                after = place
        path = after
    return verdicts
