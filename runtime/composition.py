"""What the next pass holds: which sequences, how much of each prompt, and which drafts."""

import time
from collections.abc import Callable, Sequence

from engines.probes.row_invariance import RowInvariance
from engines.session import Session
from runtime.active_request import ActiveRequest
from runtime.control.candidates import NO_SELECTION, JointSelection, Prepared, select_jointly
from runtime.control.controller import Knowledge
from runtime.control.growth import grow, kind_of_pass
from runtime.control.latency import NO_THRESHOLD, Latencies, Threshold
from runtime.kv_cache import PREFIX_STEP, common_length
from runtime.segment import NO_PROPOSAL, Proposal, Segment
from runtime.slots import ScheduledSequence, Slots

# Seconds that a sequence whose consumer does not ask for its next step keeps its slot while others wait for one.
PATIENCE = 0.05
# Seconds that a pass with chunks of prompts may take, by the latencies known, where others wait for its end: those of a
# chunk of a prompt alone, and this long at most; and the positions of prompts that it holds at least.
_MOST_STALL_SECONDS = 0.1
_LEAST_CHUNK = 16
# Drafts of a pass, at most, whose threshold decides whether any are prepared.
_CONSIDERED = 32


class Composer:
    """Composes the passes of a session. Used by one thread at a time (`runtime.scheduler`)."""

    def __init__(
        self,
        session: Session,
        slots: Slots,
        *,
        exact: RowInvariance,
        knowledge: Callable[[], Knowledge] | None = None,
        max_batch_tokens: int | None = None,
        stall_seconds: float | None = None,
    ) -> None:
        """As `Scheduler` has them."""
        self._slots, self._exact, self._knowledge, self._stall_seconds = slots, exact, knowledge, stall_seconds
        # Where a prompt's bits depend on where it is cut, or plain decoding is padded, sequences do not share passes.
        self._shares = session.max_sequences > 1 and exact.batch and exact.prefill and exact.chain == 1
        self._chunk = session.contract.prefill_chunk
        self._most_positions = min(session.max_positions, max_batch_tokens or session.max_positions)
        # Each feeds a position at least.
        self._most_sequences = min(session.max_sequences, self._most_positions) if self._shares else 1

    @property
    def shares_passes(self) -> bool:
        """Whether sequences go on in the same passes."""
        return self._most_sequences > 1

    def choose(self, going: list[ActiveRequest], active: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """Those of the requests that can go on that the next pass is for, each with a slot.

        `active`: all, some of which may have to give their slots up.
        """
        if self._most_sequences == 1 and len(going) > 1:
            # One after the other: whoever has a slot and is waited for goes on; among them, the longest ago.
            going = sorted(going, key=lambda one: (not one.hungry, one.rank, not one.scheduled.resident, one.last_pass))
        now = time.monotonic()
        chosen: list[ActiveRequest] = []
        owners = {id(request.scheduled): request for request in active}

        def may_leave(other: ScheduledSequence) -> int | None:
            owner = owners.get(id(other))
            # First of all: a consumer may end its request at any moment, and this pass writes to its slot all the same.
            if owner in chosen:
                return None
            if owner is None or not owner.goes_on:
                return 0
            if not owner.has_room:
                return 1
            if request.hungry and not owner.hungry and now - owner.asked_at > PATIENCE:
                return 2
            return 3 if owner.rank > request.rank else None

        for request in going:
            if len(chosen) == self._most_sequences:
                break
            decoding = request.decoding
            prompt = None if decoding.begun or not self._exact.prefill else decoding.sequence.tokens
            # Another one's positions may find no memory outside of the cache.
            with request.own_errors:
                if self._slots.bring(request.scheduled, may_leave, prompt=prompt):
                    chosen.append(request)
        return chosen

    def segments(self, chosen: list[ActiveRequest]) -> list[tuple[ActiveRequest, Segment]]:
        """What each request feeds; those whose own code fails get the error, and feed nothing."""
        fed: list[tuple[ActiveRequest, Segment]] = []
        prompts: list[ActiveRequest] = []
        decoding: list[ActiveRequest] = []
        for request in chosen:
            with request.own_errors:
                request.decoding.begin()
                (prompts if request.decoding.sequence.prompt_left else decoding).append(request)
        prompts = [one for one in prompts if not self._follows(one, prompts) and one.error is None]
        room = self._most_positions - len(decoding)
        sizes: list[int | None] = [None] * len(prompts)
        if self._shares and prompts:
            left = [one.decoding.sequence.prompt_left for one in prompts]
            cached = max(one.decoding.sequence.cache_length for one in prompts)
            budget = max(1, min(room, self._prompt_budget(len(decoding), left, cached)))
            sizes = list(chunk_sizes(left, budget))
        for request, size in zip(prompts, sizes, strict=True):
            if size != 0:
                with request.own_errors:
                    fed.append((request, request.decoding.sequence.next_pass(most=size)))
        room -= sum(len(segment.tokens) for _, segment in fed)
        proposals = self._proposals(decoding, [segment for _, segment in fed], room)
        for request, proposal in zip(decoding, proposals, strict=True):
            if request.error is None:
                with request.own_errors:
                    fed.append((request, request.decoding.sequence.next_pass(proposal)))
        return fed

    def _follows(self, request: ActiveRequest, prompts: Sequence[ActiveRequest]) -> bool:
        """Whether another prompt is being fed that begins as this one and is as far: this one waits for its positions.

        What the other one has by now is copied first.
        """
        scheduled, sequence = request.scheduled, request.decoding.sequence
        if scheduled.salt is None or not self._exact.prefill:
            return False
        mine = sequence.tokens
        with request.own_errors:
            request.decoding.found(self._slots.copy_prefix(scheduled, mine))
        for other in prompts:
            if other is request:
                break
            if other.scheduled.salt != scheduled.salt:
                continue
            ahead = other.decoding.sequence
            common = common_length(mine[:-1], ahead.tokens[:-1])
            if common // PREFIX_STEP * PREFIX_STEP > max(sequence.cache_length, ahead.cache_length):
                return True
        return False

    def _prompt_budget(self, num_decoding: int, left: Sequence[int], cached: int) -> int:
        """Positions of prompts in the next pass.

        Its time is bounded where others wait for its end: sequences that decode in it, and beside a long prompt the
        short ones whose first token it brings.

        Args:
            left: positions that each prompt still has to be fed.
            cached: those of which the most were fed already, to which the others' share attends at most.
        """
        if self._knowledge is None:
            return self._most_positions
        latency = self._knowledge().latency
        stall = self._stall_seconds or min(_MOST_STALL_SECONDS, latency.seconds_of([(0, self._chunk)]))
        most: int = latency.positions_within(stall, cached=cached)
        most = max(_LEAST_CHUNK, most - num_decoding)
        ends_early = min(left) <= most // 2 and sum(left) > self._most_positions
        return most if num_decoding or ends_early else self._most_positions

    def _proposals(self, decoding: list[ActiveRequest], fed: Sequence[Segment], room: int) -> list[Proposal]:
        """What is drafted for each sequence that decodes; `fed`: what the pass holds of prompts."""
        if len(decoding) == 1 and not fed:
            proposal = NO_PROPOSAL
            with decoding[0].own_errors:
                proposal = decoding[0].decoding.propose(max(0, room))
            return [proposal]
        if not any(request.decoding.drafts for request in decoding):
            return [NO_PROPOSAL] * len(decoding)
        cached = [request.decoding.sequence.cache_length for request in decoding]
        prompts = [(segment.cache_length, len(segment.tokens)) for segment in fed]
        threshold = NO_THRESHOLD
        if self._knowledge is not None:
            threshold = self._knowledge().latency.threshold(
                [(length, 1) for length in cached], beside=prompts, most=max(0, min(room, _CONSIDERED))
            )
        # What is drafted whatever it brings must fit, too.
        prepared = [self._prepare(request, threshold, most=room // len(decoding)) for request in decoding]
        parts = [one for one in prepared if isinstance(one, Prepared)]
        # Nobody needs to compare where there is nothing to choose from.
        selection, prompt_seconds = NO_SELECTION, 0.0
        if any(part.candidates.tokens or part.sprouts for part in parts) and self._knowledge is not None:
            widths = [1 if isinstance(one, Prepared) else 1 + len(one.draft.tokens) for one in prepared]
            wanted = sum(part.most if part.sprouts else len(part.candidates.tokens) for part in parts)
            latency, prompt_seconds = self._knowledge().latency.of_rounds(
                list(zip(cached, widths, strict=True)),
                beside=prompts,
                most=max(0, min(room - sum(widths) + len(widths), wanted)),
            )
            try:
                selection = select_jointly(parts, latency, others=len(decoding) - len(parts))
                if any(part.sprouts for part in parts):
                    selection = self._with_heads(decoding, prepared, latency, selection)
            except Exception:  # of what a drafter says of itself: whose it is shows when each is asked alone
                if not _blames(decoding, prepared):
                    raise
        proposals: list[Proposal] = []
        place = 0
        for request, one in zip(decoding, prepared, strict=True):
            if isinstance(one, Proposal):
                proposals.append(one)
                continue
            settled = NO_PROPOSAL
            with request.own_errors:
                settled = request.decoding.control.settle(
                    selection.chosen[place] if selection.chosen else [],
                    tokens=selection.tokens[place] if selection.tokens else 1.0,
                    seconds=selection.seconds + prompt_seconds,
                    gain=selection.gains[place] if selection.gains else 0.0,
                )
            proposals.append(settled)
            place += 1
        return proposals

    def _with_heads(
        self,
        decoding: Sequence[ActiveRequest],
        prepared: Sequence[Proposal | Prepared],
        latency: Latencies,
        plain: JointSelection,
    ) -> JointSelection:
        """The selection where draft heads draft as well, all sequences' in the same steps; `plain`: without them."""
        assert self._knowledge is not None
        gains, kind = self._knowledge().head_gains, kind_of_pass(len(decoding))
        if not gains.asks(kind):
            return plain
        parts = [(one, part) for one, part in zip(decoding, prepared, strict=True) if isinstance(part, Prepared)]
        sprouts = [sprout for _, part in parts for sprout in part.sprouts]
        start = time.perf_counter()
        spent = 0.0
        try:
            spent = grow(sprouts, latency, others=len(decoding) - len(sprouts))
        except Exception as error:  # the head's: of the requests that draft with it, and of no other
            for request, part in parts:
                if part.sprouts:
                    with request.own_errors:
                        raise error
        if not spent:
            return plain
        took = time.perf_counter() - start
        spent = max(spent, took)
        regrown: list[Prepared] = []
        for request, part in parts:
            if part.sprouts:
                request.decoding.drafted_for(took)
            regrown.append(part.regrown() if part.sprouts and part.regrown is not None else part)
        selection = select_jointly(regrown, latency.after(spent), others=len(decoding) - len(parts))
        caught_up = any(sprout.head.caught_up for sprout in sprouts)
        gains.count(kind, with_head=selection, without=plain, caught_up=caught_up)
        return selection

    def _prepare(self, request: ActiveRequest, threshold: Threshold, *, most: int) -> Proposal | Prepared:
        """A sequence's drafts, or what they may be chosen from; none where it does not pay to ask for any."""
        decoding = request.decoding
        with request.own_errors:
            if decoding.drafts and decoding.control.asks(threshold):
                return decoding.prepare(most)
        return NO_PROPOSAL


def _blames(requests: Sequence[ActiveRequest], prepared: Sequence[Proposal | Prepared]) -> bool:
    """Give those the error whose candidates' probabilities cannot be had; whether there are any."""
    for request, one in zip(requests, prepared, strict=True):
        if isinstance(one, Prepared):
            with request.own_errors:
                for place in range(len(one.candidates.tokens)):
                    one.probability(place)
    return any(request.error is not None for request in requests)


def chunk_sizes(left: Sequence[int], budget: int) -> list[int]:
    """How many positions of each prompt the next pass takes, first come first served: int per prompt, 0 or more.

    The first prompt in line gets half of the budget at least, so that none starves. The other half goes to prompts
    that end in this pass, shortest first: they need not wait for a long one before them. What is left goes down the
    line.

    Args:
        left: positions that each prompt still has to be fed, in the order of the line.
        budget: positions of prompts in this pass, 1 or more.
    """
    if not left:
        return []
    sizes = [0] * len(left)
    sizes[0] = min(left[0], max(1, budget // 2))
    rest = budget - sizes[0]
    for place in sorted(range(1, len(left)), key=lambda place: left[place]):
        if left[place] > rest:
            break
        sizes[place] = left[place]
        rest -= left[place]
    for place, wanted in enumerate(left):
        more = min(rest, wanted - sizes[place])
        sizes[place] += more
        rest -= more
    return sizes
