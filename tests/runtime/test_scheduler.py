"""Sequences share one slot: they are swapped out and come back, idle ones give way, busy ones do not."""

import threading
import time

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime import scheduler as scheduling
from runtime.kv_cache import KVCache
from runtime.scheduler import Scheduler
from runtime.testing import TableSession


def session():
    return TableSession(lambda context: 0)


def new(scheduler, one):
    return scheduler.add(KVCache(one.contract))


def write(scheduler, one, owner, tokens):
    with scheduler.step(owner):
        one.run(np.array(tokens), owner.cache.length, 1)
        owner.cache.commit(np.array(tokens))


def test_positions_come_back_as_they_were():
    one = session()
    scheduler = Scheduler(one)
    first, second = new(scheduler, one), new(scheduler, one)
    write(scheduler, one, first, [1, 2, 3])
    write(scheduler, one, second, [7, 8])
    assert scheduler.swapped_out_bytes() == 12
    with scheduler.step(first):
        assert one.read_rows(0, 3).reshape(-1).tolist() == [1, 2, 3]
    assert first.swapped_out is None
    with scheduler.step(second):
        assert one.read_rows(0, 2).reshape(-1).tolist() == [7, 8]


def test_a_released_sequence_is_not_kept():
    one = session()
    scheduler = Scheduler(one)
    first, second = new(scheduler, one), new(scheduler, one)
    write(scheduler, one, first, [1, 2, 3])
    scheduler.release(first)
    write(scheduler, one, second, [7])
    assert first.swapped_out is None


def test_a_generating_sequence_gives_way_when_it_is_left_alone():
    one = session()
    scheduler = Scheduler(one)
    first, second = new(scheduler, one), new(scheduler, one)
    scheduler.begin(first)
    write(scheduler, one, first, [1])
    start = time.monotonic()
    write(scheduler, one, second, [2])
    assert time.monotonic() - start >= scheduling.PATIENCE * 0.9
    scheduler.end(first)
    # A sequence that is not generating gives way at once: no patience is left to wait for.
    assert scheduler._seconds_to_wait() == 0


def test_one_generation_of_a_sequence_at_a_time():
    scheduler = Scheduler(session())
    first = new(scheduler, session())
    scheduler.begin(first)
    with pytest.raises(GenerationError, match="this conversation is generating already"):
        scheduler.begin(first)
    scheduler.end(first)
    scheduler.begin(first)


def test_an_interruption_ends_the_waiting():
    one = session()
    scheduler = Scheduler(one)
    first, second = new(scheduler, one), new(scheduler, one)
    entered, leave = threading.Event(), threading.Event()

    def step():
        with scheduler.step(first):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=step)
    thread.start()
    entered.wait()
    with scheduler.step(second, lambda: True) as granted:
        assert not granted
    leave.set()
    thread.join()
    with scheduler.step(second, lambda: True) as granted:
        # Nobody is in the way.
        assert granted


def test_close_waits_for_the_step_and_refuses_the_next():
    one = session()
    closed = []
    one.close = lambda: closed.append(True)
    scheduler = Scheduler(one)
    first = new(scheduler, one)
    entered, leave = threading.Event(), threading.Event()

    def step():
        with scheduler.step(first):
            entered.set()
            leave.wait()
            assert not closed

    thread = threading.Thread(target=step)
    thread.start()
    entered.wait()
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    leave.set()
    thread.join()
    closing.join()
    assert closed == [True]
    with pytest.raises(GenerationError, match="this engine is closed"), scheduler.step(first):
        pass
    scheduler.close()
    assert closed == [True]


def test_a_step_that_fails_leaves_the_slot():
    scheduler = Scheduler(session())
    first = new(scheduler, session())
    with pytest.raises(KeyError), scheduler.step(first):
        raise KeyError
    with scheduler.step(first) as granted:
        assert granted


def test_nothing_runs_inside_a_step_of_its_own():
    one = session()
    scheduler = Scheduler(one)
    first, second = new(scheduler, one), new(scheduler, one)
    with scheduler.step(first):
        with pytest.raises(GenerationError, match="a hook or a drafter used the engine"), scheduler.step(second):
            pass
        with pytest.raises(GenerationError, match="a hook or a drafter used the engine"):
            scheduler.close()
    write(scheduler, one, second, [1])


def test_a_sequence_that_waits_is_not_overtaken_by_new_ones():
    """One thread makes sequence after sequence without a pause; another one's first step comes as soon as it may."""
    one = session()
    scheduler = Scheduler(one)
    stop, steps = threading.Event(), []

    def busily():
        while not stop.is_set():
            owner = new(scheduler, one)
            scheduler.begin(owner)
            for _ in range(3):
                with scheduler.step(owner):
                    time.sleep(0.001)
            scheduler.end(owner)
            scheduler.release(owner)
            steps.append(owner)

    thread = threading.Thread(target=busily)
    thread.start()
    for _ in range(5):
        waits = new(scheduler, one)
        before = len(steps)
        write(scheduler, one, waits, [1])
        # The sequence that was under way, and at most the one that had asked before.
        assert len(steps) - before <= 2
    stop.set()
    thread.join()


def test_positions_of_a_sequence_that_was_released_meanwhile_are_not_kept():
    one = session()
    scheduler = Scheduler(one)
    first, second = new(scheduler, one), new(scheduler, one)
    write(scheduler, one, first, [1, 2])
    read = one.read_rows

    def read_and_release(*arguments):
        positions = read(*arguments)
        scheduler.release(first)
        return positions

    one.read_rows = read_and_release
    write(scheduler, one, second, [3])
    assert scheduler.swapped_out_bytes() == 0


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
            (range(11), 8),
            (range(9), 8),
            # The last token is always fed.
            (range(8), 4),
            ([0, 1, 2, 3, 4, 5, 9, 9, 9], 4),
            ([9, 1, 2, 3, 4, 5], 0),
            ([0], 0),
        ],
    )
    def test_the_longest_common_prefix_in_whole_chunks(self, prompt, reused):
        assert self.cache(list(range(10))).reusable(np.array(prompt), decoded_exact=True) == reused

    def test_decoded_positions_do_not_serve_where_they_are_not_exact(self):
        prompt = np.arange(13)
        assert self.cache(list(range(12)), prefilled=8).reusable(prompt, decoded_exact=False) == 8
        assert self.cache(list(range(12)), prefilled=8).reusable(prompt, decoded_exact=True) == 12
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
