"""Requests share passes and slots, and every one gets the tokens that it gets alone."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.probes.row_invariance import RowInvariance
from quasar.errors import GenerationError, QueueFullError
from runtime.active_request import UNREAD
from runtime.composition import chunk_sizes
from runtime.drafters import Draft
from runtime.kv_cache import KVCache
from runtime.scheduler import FIRST_OF_ALL
from runtime.testing import TableSession
from tests.runtime.scheduling import KINDS, Service, answer_alone

LONG = [place * 5 % KINDS for place in range(300)]


def widths(service):
    """How many sequences each pass held."""
    return [len(call) for call in service.session.passes]


@st.composite
def requests(draw):
    prompt = draw(st.lists(st.integers(0, KINDS - 1), min_size=1, max_size=60))
    return {
        "prompt": LONG[: draw(st.sampled_from([0, 0, 40, 300]))] + prompt,
        "count": draw(st.integers(1, 30)),
        "drafts": draw(st.sampled_from([0, 0, 2, 5])),
        "priority": draw(st.integers(0, 2)),
        "salt": draw(st.sampled_from([None, "a", "b"])),
        "leaves_after": draw(st.sampled_from([None, None, None, 1, 3])),
        "cancelled_after": draw(st.sampled_from([None, None, None, 0, 2])),
        "begins": draw(st.integers(0, 12)),
    }


class TestEveryAnswerIsItsOwn:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(requests(), min_size=1, max_size=8), st.integers(1, 4), st.data())
    def test_in_one_thread_that_reads_in_any_order(self, wanted, slots, data):
        """Arrivals, lengths, cancels, consumers that leave, priorities and swaps, all at random."""
        service = Service(slots)
        turn = 0
        streams = {}
        tokens = {place: [] for place in range(len(wanted))}
        cancels = {place: threading.Event() for place in range(len(wanted))}
        waiting = sorted(range(len(wanted)), key=lambda place: wanted[place]["begins"])
        done = set()
        while len(done) < len(wanted):
            turn += 1
            while waiting and (wanted[waiting[0]]["begins"] <= turn or not streams):
                place = waiting.pop(0)
                one = wanted[place]

                def interrupted(cancel=cancels[place]):
                    return "cancelled" if cancel.is_set() else None

                request = service.start(
                    one["prompt"],
                    one["count"],
                    drafts=one["drafts"],
                    priority=one["priority"],
                    salt=one["salt"],
                    interrupted=interrupted,
                )
                streams[place] = [service.stream(request), 0]
                if one["cancelled_after"] == 0:
                    cancels[place].set()
            place = data.draw(st.sampled_from(sorted(streams)))
            step = next(streams[place][0])
            tokens[place] += step.round.tokens
            streams[place][1] += 1
            if streams[place][1] == wanted[place]["cancelled_after"]:
                cancels[place].set()
            left = streams[place][1] == wanted[place]["leaves_after"]
            if left or step.round.finish_reason is not None:
                streams[place][0].close()
                del streams[place]
                done.add(place)
        for place, one in enumerate(wanted):
            alone = answer_alone(one["prompt"], one["count"])
            whole = one["leaves_after"] is None and one["cancelled_after"] is None
            assert tokens[place] == (alone if whole else alone[: len(tokens[place])])
        assert service.scheduler.swapped_out_bytes() == 0

    def test_in_threads(self):
        service = Service(slots=3)
        random = np.random.default_rng(1)
        jobs = [
            (random.integers(0, KINDS, random.integers(1, 300)).tolist(), int(random.integers(1, 40)), place % 2 * 3)
            for place in range(48)
        ]
        found = {}

        def serve(first):
            for place in range(first, len(jobs), 6):
                prompt, count, drafts = jobs[place]
                found[place] = service.answer(prompt, count, drafts=drafts, salt="x" if place % 3 else None)

        threads = [threading.Thread(target=serve, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for place, (prompt, count, _) in enumerate(jobs):
            assert found[place] == answer_alone(prompt, count)
        assert max(widths(service)) == 3


class TestPasses:
    def test_sequences_that_are_there_share_them(self):
        service = Service(slots=4)
        running = [service.start([place], 20, most_unread=None) for place in range(4)]
        answers = [[token for step in service.stream(one) for token in step.round.tokens] for one in running]
        assert answers == [answer_alone([place], 20) for place in range(4)]
        assert widths(service) == [4] * 20

    def test_more_than_slots_wait_in_the_order_in_which_they_came(self):
        service = Service(slots=2)
        running = [service.start([place], 5, most_unread=None) for place in range(5)]
        last = list(service.stream(running[-1]))
        assert len(last) == 5
        assert widths(service) == [2] * 10 + [1] * 5
        order = [cached for one in service.session.passes for cached, _ in one]
        assert order.count(0) == 5

    def test_a_lower_priority_number_goes_first_and_takes_a_slot(self):
        service = Service(slots=1)
        slow = service.start([1], 30, priority=5, most_unread=None)
        first = service.scheduler.take(slow)
        assert service.answer([2, 3], 10, priority=0) == answer_alone([2, 3], 10)
        rest = [token for step in service.stream(slow) for token in step.round.tokens]
        assert [*first.round.tokens, *rest] == answer_alone([1], 30)

    def test_a_low_priority_does_not_starve(self, monkeypatch):
        # Aged at once: those that came after it, however urgent, come after it now.
        monkeypatch.setattr("runtime.scheduler.AGED_SECONDS", 0.0)
        service = Service(slots=2)
        urgent = service.start([1], 5, priority=0, most_unread=None)
        patient = service.start([2], 5, priority=9, most_unread=None)
        later = [service.start([3 + place], 5, priority=0, most_unread=None) for place in range(3)]
        for request in (urgent, *later, patient):
            assert len(list(service.stream(request))) == 5
        assert urgent.last_pass == patient.last_pass < min(one.last_pass for one in later)

    def test_waiting_reaches_no_rank_of_what_looks_after_the_engine(self, monkeypatch):
        """Whoever waited counts as urgent as the most urgent user: a look at the engine goes before all of them."""
        monkeypatch.setattr("runtime.scheduler.AGED_SECONDS", 0.0)
        service = Service(slots=2)
        waiting = [service.start([1 + place], 5, priority=9 - place, most_unread=None) for place in range(3)]
        looking = service.start([7], 1, priority=FIRST_OF_ALL, most_unread=None)
        for request in (*waiting, looking):
            assert len(list(service.stream(request))) in (1, 5)
        assert looking.last_pass < min(one.last_pass for one in waiting)
        assert FIRST_OF_ALL not in {one.rank for one in waiting}

    def test_a_reader_that_pauses_holds_no_slot(self):
        service = Service(slots=1)
        paused = service.stream(service.start([1], 100))
        tokens = [*next(paused).round.tokens]
        assert service.answer([2], 50) == answer_alone([2], 50)
        for step in paused:
            tokens += step.round.tokens
        assert tokens == answer_alone([1], 100)

    def test_a_stream_is_a_few_steps_ahead_of_its_reader_at_most(self):
        service = Service(slots=2)
        paused = service.start([1], 100)
        service.scheduler.take(paused)
        assert service.answer([2], 50) == answer_alone([2], 50)
        assert len(paused.unread) == UNREAD

    @pytest.mark.parametrize(
        "exact",
        [
            RowInvariance(chain=1, widest=32, batch=True),
            RowInvariance(chain=4, widest=32, prefill=True, batch=True),
            RowInvariance(chain=1, widest=32, prefill=True),
            RowInvariance(chain=None, widest=1),
        ],
        ids=["prompts depend on where they are cut", "plain decoding is padded", "not exact", "no width is exact"],
    )
    def test_kernels_that_are_not_exact_run_one_sequence_a_pass(self, exact):
        service = Service(slots=3, exact=exact)
        running = [service.start(LONG[: 260 + place], 10, most_unread=None) for place in range(3)]
        answers = [[token for step in service.stream(one) for token in step.round.tokens] for one in running]
        assert answers == [answer_alone(LONG[: 260 + place], 10) for place in range(3)]
        assert set(widths(service)) == {1}

    def test_a_long_prompt_and_short_ones_share_the_budget(self):
        service = Service(slots=4, max_batch_tokens=64)
        long = service.start(LONG, 3, most_unread=None)
        short = [service.start([place, 1, 2], 3, most_unread=None) for place in range(3)]
        for one in short:
            assert len(list(service.stream(one))) == 3
        # The long one is half-way: a pass of it took 64 positions at most, and none of the others waited for its end.
        assert not long.unread
        assert max(sum(len(tokens) for _, tokens in one) for one in service.session.passes) <= 64
        assert [token for step in service.stream(long) for token in step.round.tokens] == answer_alone(LONG, 3)


class TestPrefixes:
    def fed(self, service):
        return sum(len(tokens) for one in service.session.passes for _, tokens in one)

    def test_requests_with_one_salt_feed_a_common_beginning_once(self):
        service = Service(slots=8)
        running = [service.start([*LONG, place], 1, salt="t", most_unread=None) for place in range(6)]
        answers = [[token for step in service.stream(one) for token in step.round.tokens] for one in running]
        assert answers == [answer_alone([*LONG, place], 1) for place in range(6)]
        # 300 positions once, and of each what a multiple of 16 leaves.
        assert self.fed(service) == 301 + 5 * (301 - 288)

    def test_positions_of_one_that_has_ended_serve(self):
        service = Service(slots=2)
        service.answer([*LONG, 1], 4, salt="t")
        before = self.fed(service)
        [step] = list(service.stream(service.start([*LONG, 2], 1, salt="t")))
        assert step.round.reused == 288
        assert self.fed(service) - before == 301 - 288

    def test_the_least_recently_used_go_first(self):
        service = Service(slots=2)
        for place in range(3):
            service.answer([place] * 40, 1, salt="t")
        reused = [next(service.stream(service.start([place] * 41, 2, salt="t"))).round.reused for place in (2, 1, 0)]
        assert reused == [32, 32, 0]

    @pytest.mark.parametrize(("first", "second"), [("a", "b"), (None, None), ("a", None), (None, "a")])
    def test_nothing_is_shared_between_salts(self, first, second):
        service = Service(slots=2)
        service.answer([*LONG, 1], 4, salt=first)
        [step] = list(service.stream(service.start([*LONG, 1], 1, salt=second)))
        assert step.round.reused == 0

    def test_one_that_was_waited_for_may_go_away(self):
        service = Service(slots=2, max_batch_tokens=64)
        first = service.start([*LONG, 1], 4, salt="t")
        second = service.start([*LONG, 2], 4, salt="t", most_unread=None)
        # A pass or two of the first; then its consumer leaves.
        third = service.answer([1], 2)
        assert third == answer_alone([1], 2)
        service.finish(first)
        assert [token for step in service.stream(second) for token in step.round.tokens] == answer_alone([*LONG, 2], 4)


class TestFailures:
    def test_what_a_request_s_own_drafter_raises_is_its_own(self):
        class Failing:
            def propose(self, context, max_tokens):
                raise KeyError("mine")

        service = Service(slots=3)
        good = [service.start([place], 10, most_unread=None) for place in range(2)]
        bad = service.start([5], 10, drafts=2, drafter=Failing())
        with pytest.raises(KeyError, match="mine"):
            list(service.stream(bad))
        answers = [[token for step in service.stream(one) for token in step.round.tokens] for one in good]
        assert answers == [answer_alone([place], 10) for place in range(2)]

    def test_what_finds_no_memory_outside_of_the_cache_ends_alone(self):
        def no_memory(first, end, *, slot=0):
            raise MemoryError(f"positions {first} to {end}")

        service = Service(slots=1)
        slow = service.start([1], 30, priority=5, most_unread=None)
        first = service.scheduler.take(slow)
        service.session.read_rows = no_memory
        with pytest.raises(MemoryError, match="positions 0 to"):
            service.answer([2, 3], 10, priority=0)
        rest = [token for step in service.stream(slow) for token in step.round.tokens]
        assert [*first.round.tokens, *rest] == answer_alone([1], 30)

        service = Service(slots=2)
        service.session.read_rows = no_memory
        one, other = (service.start([*LONG, place], 1, salt="t", most_unread=None) for place in range(2))
        with pytest.raises(MemoryError, match="positions 0 to 256"):
            list(service.stream(other))
        assert [token for step in service.stream(one) for token in step.round.tokens] == answer_alone([*LONG, 0], 1)

    def test_a_pass_that_fails_is_made_again_for_each(self):
        service = Service(slots=3)
        run = service.session.run_batch

        def refuses_five(batch, **options):
            if any(5 in one.tokens for one in batch):
                raise GenerationError("no five")
            return run(batch, **options)

        service.session.run_batch = refuses_five
        good = [service.start([place], 1, most_unread=None) for place in range(2)]
        bad = service.start([5], 1)
        with pytest.raises(GenerationError, match="no five"):
            list(service.stream(bad))
        for place, one in enumerate(good):
            assert [token for step in service.stream(one) for token in step.round.tokens] == answer_alone([place], 1)

    def test_an_interrupt_of_the_thread_ends_the_request_that_it_hit_alone(self):
        class Interrupted:
            def propose(self, context, max_tokens):
                raise KeyboardInterrupt

        service = Service(slots=3)
        good = service.start([1], 10, most_unread=None)
        service.scheduler.take(good)
        bad = service.start([5], 10, drafts=2, drafter=Interrupted())
        with pytest.raises(KeyboardInterrupt):
            list(service.stream(bad))
        assert sum(len(step.round.tokens) for step in service.stream(good)) == 9

    def test_an_interrupt_in_the_scheduler_s_own_thread_ends_nobody_else(self):
        class Interrupted:
            def propose(self, context, max_tokens):
                raise SystemExit

        service = Service(slots=4)
        answers = {}

        def serve(place):
            try:
                answers[place] = service.answer([place], 30, drafts=2, drafter=Interrupted() if place == 2 else None)
            except BaseException as error:
                answers[place] = error

        threads = [threading.Thread(target=serve, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert isinstance(answers.pop(2), SystemExit)
        assert answers == {place: answer_alone([place], 30) for place in (0, 1, 3)}

    def test_fixed_drafts_of_many_fit_a_pass(self):
        class Always:
            def propose(self, context, max_tokens):
                return Draft(tokens=np.zeros(max_tokens, np.int64))

        service = Service(slots=16)
        running = [service.start([place], 10, drafts=31, drafter=Always(), most_unread=None) for place in range(16)]
        answers = [[token for step in service.stream(one) for token in step.round.tokens] for one in running]
        assert answers == [answer_alone([place], 10) for place in range(16)]
        assert max(sum(len(tokens) for _, tokens in one) for one in service.session.passes) <= 256

    def test_the_queue_has_an_end(self):
        service = Service(slots=1, queue_limit=2)
        running = [service.start([place], 3) for place in range(3)]
        with pytest.raises(QueueFullError, match="3 requests are under way or wait; max_sequences 1 and queue_limit 2"):
            service.start([7], 3)
        for one in running:
            list(service.stream(one))
        assert service.answer([6], 3) == answer_alone([6], 3)

    def test_one_generation_of_a_sequence_at_a_time(self):
        scheduler = (service := Service()).scheduler
        first = service.new()
        scheduler.begin(first)
        with pytest.raises(GenerationError, match="this conversation is generating already"):
            scheduler.begin(first)
        scheduler.end(first)
        scheduler.begin(first)

    def test_a_thousand_consumers_that_vanish_leave_nothing(self):
        service = Service(slots=2)
        for place in range(1000):
            stream = service.stream(service.start([place % KINDS], 50))
            next(stream)
            stream.close()
        assert not service.scheduler._active
        assert service.scheduler.swapped_out_bytes() == 0
        assert service.answer([1], 5) == answer_alone([1], 5)
        assert [one for one in threading.enumerate() if one.name == "quasar-engine"] == []


class TestAlone:
    """Who has the session for himself."""

    def write(self, service, owner, tokens):
        with service.scheduler.alone(owner):
            service.session.run_batch([scheduling_positions(owner, tokens)])
            owner.cache.commit(np.array(tokens))

    def test_positions_come_back_as_they_were(self):
        service = Service(slots=1)
        first, second = service.new(), service.new()
        self.write(service, first, [1, 2, 3])
        self.write(service, second, [7, 8])
        assert service.scheduler.swapped_out_bytes() == 12
        with service.scheduler.alone(first):
            assert service.session.read_rows(0, 3).reshape(-1).tolist() == [1, 2, 3]
        assert first.swapped_out is None
        with service.scheduler.alone(second):
            assert service.session.read_rows(0, 2).reshape(-1).tolist() == [7, 8]

    def test_a_released_sequence_is_not_kept(self):
        service = Service(slots=1)
        first, second = service.new(), service.new()
        self.write(service, first, [1, 2, 3])
        service.scheduler.release(first)
        self.write(service, second, [7])
        assert first.swapped_out is None
        with pytest.raises(GenerationError, match="this conversation is closed"), service.scheduler.alone(first):
            pass

    def test_nothing_runs_inside(self):
        service = Service()
        first, second = service.new(), service.new()
        with service.scheduler.alone(first):
            with pytest.raises(GenerationError, match="a hook or a drafter used the engine"):
                service.scheduler.close()
            with (
                pytest.raises(GenerationError, match="a hook or a drafter used the engine"),
                service.scheduler.alone(second),
            ):
                pass
        self.write(service, second, [1])

    def test_what_fails_leaves_the_session(self):
        service = Service()
        first = service.new()
        with pytest.raises(KeyError), service.scheduler.alone(first):
            raise KeyError
        self.write(service, first, [1])

    def test_it_comes_between_two_passes_of_the_busy(self):
        service = Service(slots=2)
        stop = threading.Event()

        def busily(place):
            while not stop.is_set():
                service.answer([place], 20)

        threads = [threading.Thread(target=busily, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            self.write(service, service.new(), [1])
        stop.set()
        for thread in threads:
            thread.join()

    def test_close_waits_and_refuses_what_comes_later(self):
        service = Service()
        closed = []
        service.session.close = lambda: closed.append(True)
        first = service.new()
        entered, leave = threading.Event(), threading.Event()

        def use():
            with service.scheduler.alone(first):
                entered.set()
                leave.wait()
                assert not closed

        thread = threading.Thread(target=use)
        thread.start()
        entered.wait()
        closing = threading.Thread(target=service.scheduler.close)
        closing.start()
        leave.set()
        thread.join()
        closing.join()
        assert closed == [True]
        with pytest.raises(GenerationError, match="this engine is closed"), service.scheduler.alone(first):
            pass
        with pytest.raises(GenerationError, match="this engine is closed"):
            service.start([1], 2)
        service.scheduler.close()
        assert closed == [True]


def scheduling_positions(owner, tokens):
    from engines.session import Positions

    return Positions(tokens=np.array(tokens), cache_length=owner.cache.length, num_logits=1, slot=owner.cache.slot)


def test_an_interruption_ends_the_waiting():
    service = Service(slots=2)
    first = service.new()
    entered, leave = threading.Event(), threading.Event()

    def use():
        with service.scheduler.alone(first):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=use)
    thread.start()
    entered.wait()
    start = time.monotonic()
    [step] = list(service.stream(service.start([1], 5, interrupted=lambda: "cancelled")))
    assert (step.round.tokens, step.round.finish_reason) == ((), "cancelled")
    assert time.monotonic() - start < 10
    leave.set()
    thread.join()


class TestChunks:
    @pytest.mark.parametrize(
        ("left", "budget", "sizes"),
        [
            ([], 8, []),
            ([100], 8, [8]),
            ([3], 8, [3]),
            ([100, 2, 3], 16, [11, 2, 3]),
            # Half of it is the first one's.
            ([100, 9, 2], 16, [14, 0, 2]),
            ([100, 100], 16, [16, 0]),
            ([4, 100], 16, [4, 12]),
            ([100], 1, [1]),
        ],
    )
    def test_the_first_in_line_and_those_that_end(self, left, budget, sizes):
        assert chunk_sizes(left, budget) == sizes

    @given(st.lists(st.integers(1, 500), max_size=8), st.integers(1, 300))
    def test_the_budget_is_used_and_kept(self, left, budget):
        sizes = chunk_sizes(left, budget)
        assert sum(sizes) == min(budget, sum(left))
        assert all(0 <= size <= most for size, most in zip(sizes, left, strict=True))
        assert not left or sizes[0] >= min(left[0], max(1, budget // 2))


class TestReuse:
    def cache(self, tokens, chunk=4, prefilled=0):
        cache = KVCache(TableSession(lambda context: 0, prefill_chunk=chunk).contract)
        for begin in range(0, prefilled, chunk):
            cache.commit(np.array(tokens[begin : begin + chunk]), prefill=True)
        cache.commit(np.array(tokens[prefilled:], np.int64))
        return cache

    @pytest.mark.parametrize(
        ("prompt", "reused"),
        [
            (range(41), 32),
            (range(33), 32),
            # The last token is always fed.
            (range(32), 16),
            ([*range(20), 9, 9, 9], 16),
            ([9, *range(1, 20)], 0),
            ([0], 0),
        ],
    )
    def test_the_longest_common_prefix_in_steps(self, prompt, reused):
        assert self.cache(list(range(40))).reusable(np.array(prompt), decoded_exact=True) == reused

    def test_decoded_positions_do_not_serve_where_they_are_not_exact(self):
        prompt = np.arange(13)
        assert self.cache(list(range(12)), prefilled=8).reusable(prompt, decoded_exact=False) == 8
        cut = self.cache(list(range(12)), prefilled=8)
        cut.truncate(7)
        cut.commit(np.arange(7, 12))
        assert cut.reusable(prompt, decoded_exact=False) == 4
        # A chunk that begins inside what decoding wrote is no prefill of these positions.
        mixed = self.cache(list(range(6)))
        mixed.commit(np.arange(6, 10), prefill=True)
        assert mixed.reusable(prompt, decoded_exact=False) == 0

    def test_a_copy_goes_its_own_way(self):
        cache = self.cache(list(range(12)), prefilled=8)
        other = cache.copy()
        other.truncate(2)
        other.commit(np.array([50, 51]))
        assert cache.tokens.tolist() == list(range(12))
        assert other.tokens.tolist() == [0, 1, 50, 51]
        assert cache.reusable(np.arange(13), decoded_exact=False) == 8


def test_a_request_that_ends_while_a_pass_is_composed_keeps_its_slot_in_it(monkeypatch):
    """Its consumer may close the stream between any two lines: the pass writes to its slot all the same."""
    service = Service(slots=2)
    ends, beside, other = (service.start([number] * 20, 8) for number in (1, 2, 3))
    composer, slots, bring = service.scheduler._composer, service.scheduler._slots, service.scheduler._slots.bring
    for request in (ends, beside):
        assert bring(request.scheduled)

    def close(sequence, *arguments, **options):
        found = bring(sequence, *arguments, **options)
        ends.ended = sequence is ends.scheduled or ends.ended
        return found

    monkeypatch.setattr(slots, "bring", close)
    chosen = composer.choose([ends, beside, other], [ends, beside, other])
    assert chosen == [ends, beside]
    assert len({request.scheduled.cache.slot for request in chosen}) == 2
    # In the next pass its slot is free.
    assert composer.choose([beside, other], [ends, beside, other]) == [beside, other]


class Following:
    """A cache that goes with the session's: what it was told."""

    def __init__(self):
        self.told = []

    def forget(self, slot):
        self.told.append(("forget", slot))

    def copy(self, source, target, tokens):
        self.told.append(("copy", source, target, tokens.tolist()))


class TestFollowingCache:
    def test_it_gets_what_is_copied_and_forgets_what_is_another_s(self):
        following = Following()
        service = Service(slots=2, following=[following])
        prompt = [*range(1, 40)]
        first = service.start(prompt, 60, salt="a")
        stream = service.stream(first)
        next(stream)
        assert following.told == [("forget", first.scheduled.cache.slot)]
        # The same beginning, beside the first request.
        other = [*prompt[:32], 5, 6, 7]
        second = service.start(other, 4, salt="a")
        assert [token for step in service.stream(second) for token in step.round.tokens] == answer_alone(other, 4)
        slots = first.scheduled.cache.slot, second.scheduled.cache.slot
        assert following.told[1:] == [("forget", slots[1]), ("copy", *slots, other)]
        # In the slot where its own beginning lies nothing is forgotten; in one that another's positions are in, it is.
        del following.told[:]
        service.answer(other, 4, salt="a")
        assert following.told == []
        service.answer(other, 4, salt="b")
        assert following.told == [("forget", slots[1])]
        list(stream)
