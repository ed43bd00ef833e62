"""How many positions of prompts a pass holds: bounded where somebody waits for its end."""

import threading
import time

from runtime.control.controller import Knowledge
from runtime.control.latency import LatencyModel
from runtime.testing import TableSession
from tests.runtime.scheduling import Service, answer_alone, next_token

# A millisecond a position, and ten for any pass.
SURFACE = {16: {1: 11.0, 16: 26.0, 256: 266.0}}
LONG, SHORT = [place % 7 for place in range(480)], [3, 1, 4]


def widths(service):
    """Positions by sequence length, of every pass."""
    return [[len(tokens) for _, tokens in held] for held in service.session.passes]


def feed_together(prompts, *, stall_seconds=0.1, session=None):
    """The passes of requests that are all there when the second pass is composed, and their answers."""
    knowledge = Knowledge(LatencyModel(SURFACE, widest=32))
    service = Service(slots=4, session=session, knowledge=lambda: knowledge, stall_seconds=stall_seconds)
    entered, leave = service.hold_passes()
    answers = {}

    def ask(place, prompt):
        answers[place] = service.answer(prompt, 2)

    threads = [threading.Thread(target=ask, args=(0, [1]))]
    threads[0].start()
    assert entered.wait(20)
    for place, prompt in enumerate(prompts, start=1):
        threads.append(threading.Thread(target=ask, args=(place, prompt)))
        threads[-1].start()
    while service.scheduler.metrics().waiting + service.scheduler.metrics().running < 1 + len(prompts):
        time.sleep(0.001)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert [answers[place] for place in range(1, len(threads))] == [answer_alone(prompt, 2) for prompt in prompts]
    return widths(service)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    passes = feed_together([LONG, SHORT])
    [with_short] = [held for held in passes if len(SHORT) in held]
    # 90 positions take a tenth of a second.
    assert len(LONG) > sum(with_short) > len(SHORT)
    assert sum(with_short) <= 90


def test_a_pass_takes_no_longer_than_a_chunk_alone_unless_it_may():
    """Where a chunk, here of 32 positions, takes less than a tenth of a second."""
    session = TableSession(next_token, slots=4, prefill_chunk=32)
    passes = feed_together([LONG, SHORT], stall_seconds=None, session=session)
    [with_short] = [held for held in passes if len(SHORT) in held]
    assert len(SHORT) < sum(with_short) <= 32


def test_a_long_prompt_alone_fills_its_passes():
    passes = feed_together([LONG])
    # After the first request has ended nobody waits.
    assert max(max(held) for held in passes) > 128


def test_prompts_that_all_fit_are_fed_in_one_pass():
    passes = feed_together([SHORT, [*SHORT, 5], [*SHORT, 5, 6]])
    assert any({3, 4, 5} <= set(held) for held in passes)
