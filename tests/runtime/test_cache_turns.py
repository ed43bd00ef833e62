"""Texts take turns on one cache: rows move out and come back, idle texts give way, busy ones do not."""

import threading
import time

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime import cache_turns
from runtime.cache_turns import CacheTurns
from runtime.kv_cache import KVCache
from runtime.testing import TableSession


def session():
    return TableSession(lambda context: 0)


def tenant(turns, one):
    return turns.new_tenant(KVCache(one.contract))


def write(turns, one, owner, tokens):
    with turns.turn(owner):
        one.run(np.array(tokens), owner.cache.length, 1)
        owner.cache.commit(np.array(tokens))


def test_rows_come_back_as_they_were():
    one = session()
    turns = CacheTurns(one)
    first, second = tenant(turns, one), tenant(turns, one)
    write(turns, one, first, [1, 2, 3])
    write(turns, one, second, [7, 8])
    assert turns.parked_bytes() == 12
    with turns.turn(first):
        assert one.read_rows(0, 3).reshape(-1).tolist() == [1, 2, 3]
    assert first.parked is None
    with turns.turn(second):
        assert one.read_rows(0, 2).reshape(-1).tolist() == [7, 8]


def test_a_released_text_is_not_kept():
    one = session()
    turns = CacheTurns(one)
    first, second = tenant(turns, one), tenant(turns, one)
    write(turns, one, first, [1, 2, 3])
    turns.release(first)
    write(turns, one, second, [7])
    assert first.parked is None


def test_a_generating_text_gives_way_when_it_is_left_alone():
    one = session()
    turns = CacheTurns(one)
    first, second = tenant(turns, one), tenant(turns, one)
    turns.begin(first)
    write(turns, one, first, [1])
    start = time.monotonic()
    write(turns, one, second, [2])
    assert time.monotonic() - start >= cache_turns.PATIENCE * 0.9
    turns.end(first)
    # A text that is not generating gives way at once: no patience is left to wait for.
    assert turns._seconds_to_wait() == 0


def test_one_generation_of_a_text_at_a_time():
    turns = CacheTurns(session())
    first = tenant(turns, session())
    turns.begin(first)
    with pytest.raises(GenerationError, match="this conversation is generating already"):
        turns.begin(first)
    turns.end(first)
    turns.begin(first)


def test_an_interruption_ends_the_waiting():
    one = session()
    turns = CacheTurns(one)
    first, second = tenant(turns, one), tenant(turns, one)
    entered, leave = threading.Event(), threading.Event()

    def step():
        with turns.turn(first):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=step)
    thread.start()
    entered.wait()
    with turns.turn(second, lambda: True) as granted:
        assert not granted
    leave.set()
    thread.join()
    with turns.turn(second, lambda: True) as granted:
        # Nobody is in the way.
        assert granted


def test_close_waits_for_the_step_and_refuses_the_next():
    one = session()
    closed = []
    one.close = lambda: closed.append(True)
    turns = CacheTurns(one)
    first = tenant(turns, one)
    entered, leave = threading.Event(), threading.Event()

    def step():
        with turns.turn(first):
            entered.set()
            leave.wait()
            assert not closed

    thread = threading.Thread(target=step)
    thread.start()
    entered.wait()
    closing = threading.Thread(target=turns.close)
    closing.start()
    leave.set()
    thread.join()
    closing.join()
    assert closed == [True]
    with pytest.raises(GenerationError, match="this engine is closed"), turns.turn(first):
        pass
    turns.close()
    assert closed == [True]


def test_a_step_that_fails_leaves_the_turn():
    turns = CacheTurns(session())
    first = tenant(turns, session())
    with pytest.raises(KeyError), turns.turn(first):
        raise KeyError
    with turns.turn(first) as granted:
        assert granted


def test_nothing_runs_inside_a_step_of_its_own():
    one = session()
    turns = CacheTurns(one)
    first, second = tenant(turns, one), tenant(turns, one)
    with turns.turn(first):
        with pytest.raises(GenerationError, match="a hook or a drafter used the engine"), turns.turn(second):
            pass
        with pytest.raises(GenerationError, match="a hook or a drafter used the engine"):
            turns.close()
    write(turns, one, second, [1])


def test_a_text_that_waits_is_not_overtaken_by_new_ones():
    """One thread makes text after text without a pause; another one's first step comes as soon as it may."""
    one = session()
    turns = CacheTurns(one)
    stop, texts = threading.Event(), []

    def busily():
        while not stop.is_set():
            owner = tenant(turns, one)
            turns.begin(owner)
            for _ in range(3):
                with turns.turn(owner):
                    time.sleep(0.001)
            turns.end(owner)
            turns.release(owner)
            texts.append(owner)

    thread = threading.Thread(target=busily)
    thread.start()
    for _ in range(5):
        waits = tenant(turns, one)
        before = len(texts)
        write(turns, one, waits, [1])
        # The text that was under way, and at most the one that had asked before.
        assert len(texts) - before <= 2
    stop.set()
    thread.join()


def test_rows_of_a_text_that_was_released_meanwhile_are_not_kept():
    one = session()
    turns = CacheTurns(one)
    first, second = tenant(turns, one), tenant(turns, one)
    write(turns, one, first, [1, 2])
    read = one.read_rows

    def read_and_release(*arguments):
        rows = read(*arguments)
        turns.release(first)
        return rows

    one.read_rows = read_and_release
    write(turns, one, second, [3])
    assert turns.parked_bytes() == 0


class TestReuse:
    def cache(self, tokens, chunk=4, prefilled=0):
        cache = KVCache(TableSession(lambda context: 0, prefill_chunk=chunk).contract)
        for begin in range(0, prefilled, chunk):
            cache.commit(np.array(tokens[begin : begin + chunk]), prefill=True)
        cache.commit(np.array(tokens[prefilled:], np.int64))
        return cache

    @pytest.mark.parametrize(
        ("prompt", "rows"),
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
    def test_the_longest_common_prefix_in_whole_chunks(self, prompt, rows):
        assert self.cache(list(range(10))).reusable(np.array(prompt), decoded_rows=True) == rows

    def test_decoded_rows_do_not_serve_where_they_are_not_exact(self):
        prompt = np.arange(13)
        assert self.cache(list(range(12)), prefilled=8).reusable(prompt, decoded_rows=False) == 8
        assert self.cache(list(range(12)), prefilled=8).reusable(prompt, decoded_rows=True) == 12
        cut = self.cache(list(range(12)), prefilled=8)
        cut.truncate(7)
        cut.commit(np.arange(7, 12))
        assert cut.reusable(prompt, decoded_rows=False) == 4
        # A chunk that begins inside what decoding wrote is no prefill of these rows.
        mixed = self.cache(list(range(6)))
        mixed.commit(np.arange(6, 10), prefill=True)
        assert mixed.reusable(prompt, decoded_rows=False) == 0

    def test_a_copy_goes_its_own_way(self):
        cache = self.cache(list(range(12)), prefilled=8)
        other = cache.copy()
        other.truncate(2)
        other.commit(np.array([50, 51]))
        assert cache.tokens.tolist() == list(range(12))
        assert other.tokens.tolist() == [0, 1, 50, 51]
        assert cache.reusable(np.arange(13), decoded_rows=False) == 8
