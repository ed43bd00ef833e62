"""What goes wrong in one request, thread or process leaves the others' answers whole, and holds nobody up."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime.control.controller import Controller, Knowledge
from runtime.control.latency import LatencyModel
from runtime.drafters import Draft, PromptLookup
from runtime.sampling.chooser import GreedyChooser
from tests.runtime.scheduling import KINDS, Service, answer_alone

LONG = [place * 5 % KINDS for place in range(300)]


def tokens_of(service, request):
    return [token for step in service.stream(request) for token in step.round.tokens]


class TestInterrupts:
    def test_what_others_took_in_before_an_interrupt_is_theirs(self):
        class Interrupted(GreedyChooser):
            def choose(self, targets, place, context):
                raise KeyboardInterrupt

        service = Service(slots=3)
        good = [service.start([place], 10, most_unread=None) for place in range(2)]
        bad = service.start([5], 10, chooser=Interrupted())
        with pytest.raises(KeyboardInterrupt):
            list(service.stream(bad))
        assert [tokens_of(service, one) for one in good] == [answer_alone([place], 10) for place in range(2)]

    def test_a_signal_that_raises_holds_nobody_up(self):
        raised = []

        def interrupted():
            raised.append(True)
            raise SystemExit

        service = Service(slots=4)
        # Nobody reads it: so nobody takes it away.
        bad = service.start([5], 30, interrupted=interrupted)
        answers = {}

        def serve(place):
            for _ in range(2):
                # The first of those that make a pass may get an interrupt of theirs.
                try:
                    answers[place] = service.answer([place], 200)
                    break
                except SystemExit:
                    continue

        threads = [threading.Thread(target=serve, args=(place,), daemon=True) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert answers == {place: answer_alone([place], 200) for place in range(3)}
        assert len(raised) == 1
        with pytest.raises(SystemExit):
            service.scheduler.take(bad)

    @pytest.mark.parametrize("where", ["take", "alone"])
    def test_an_interrupt_before_the_pass_leaves_the_session(self, where):
        service = Service(slots=2)
        first = service.start([1], 3, most_unread=None)
        kept = service.scheduler

        def interrupt(*_):
            raise KeyboardInterrupt

        if where == "take":
            kept._drive = interrupt
            with pytest.raises(KeyboardInterrupt):
                kept.take(first)
            del kept._drive
        else:
            kept._forget_released = interrupt
            with pytest.raises(KeyboardInterrupt), kept.alone(service.new()):
                pass
            del kept._forget_released
        assert kept._driver is None
        assert tokens_of(service, first) == answer_alone([1], 3)

    def test_positions_of_a_path_that_was_not_kept_are_none(self):
        service = Service(slots=2)
        request = service.start([1], 20)
        service.scheduler.take(request)
        length = request.scheduled.cache.length

        def interrupt(*_):
            raise KeyboardInterrupt

        service.verifier.keep_path = interrupt
        with pytest.raises(KeyboardInterrupt):
            service.scheduler.take(request)
        assert request.scheduled.cache.length <= length
        del service.verifier.keep_path
        service.finish(request)

    def test_a_thread_that_cannot_start_is_done_without(self, monkeypatch):
        def refuse(thread):
            raise RuntimeError("can't start new thread")

        service = Service(slots=2)
        hungry, other = service.start([1], 5), service.start([2], 5)
        other.hungry = True
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            first = service.scheduler.take(hungry)
        other.hungry = False
        rest = tokens_of(service, hungry)
        assert [*first.round.tokens, *rest] == answer_alone([1], 5)


def test_what_a_drafter_says_of_itself_wrongly_is_its_own_request_s_error():
    class Boasting:
        def propose(self, context, max_tokens):
            return Draft(tokens=np.zeros(2, np.int64))

        def prior(self, evidence):
            raise KeyError("prior")

    knowledge = Knowledge(LatencyModel({1: {1: 10.0, 8: 11.0}}, widest=32))
    service = Service(slots=3, knowledge=lambda: knowledge)
    good = [service.start([place], 10, drafts=2, most_unread=None) for place in range(2)]
    bad = service.start([5], 10, drafts=2, most_unread=None)
    for one, drafter in ((good[0], PromptLookup()), (good[1], PromptLookup()), (bad, Boasting())):
        one.decoding.control = Controller([drafter], knowledge, most=4, trees=True)
    assert [tokens_of(service, one) for one in good] == [answer_alone([place], 10) for place in range(2)]
    with pytest.raises(KeyError, match="prior"):
        tokens_of(service, bad)


class TestWithdrawn:
    def test_a_step_given_meanwhile_does_not_bring_it_back(self):
        service = Service(slots=1)
        request = service.start([1], 50, most_unread=None)
        entered, leave = service.hold_passes()
        driver = threading.Thread(target=service.scheduler.take, args=(request,))
        driver.start()
        entered.wait()
        leaving = threading.Thread(target=service.scheduler.withdraw, args=(request,))
        leaving.start()
        while not request.ended:
            time.sleep(0.001)
        leave.set()
        driver.join(10)
        leaving.join(10)
        assert request.ended
        assert not request.goes_on

    def test_a_released_sequence_gets_no_slot_and_serves_nobody_wrongly(self):
        """A conversation that is closed by another thread while its answer is under way."""
        service = Service(slots=3)
        request = service.start([*LONG, 1], 100, salt="t", most_unread=None)
        request.scheduled.outlives = True
        service.scheduler.take(request)
        other = service.start([9] * 40, 30, most_unread=None)
        service.scheduler.release(request.scheduled)
        assert tokens_of(service, other) == answer_alone([9] * 40, 30)
        assert not request.scheduled.resident
        while request.unread:
            service.scheduler.take(request)
        with pytest.raises(GenerationError, match="this conversation is closed"):
            service.scheduler.take(request)
        read = request.scheduled.cache.tokens.tolist()
        assert service.answer([*read, 3], 5, salt="t") == answer_alone([*read, 3], 5)
        assert service.answer([*LONG, 2], 5, salt="t") == answer_alone([*LONG, 2], 5)


class TestLimits:
    def test_a_pass_is_never_wider_than_it_may_be(self):
        service = Service(slots=8, max_batch_tokens=3)
        running = [service.start([place, 1, 2, 3, 4], 10, drafts=7, most_unread=None) for place in range(6)]
        assert [tokens_of(service, one) for one in running] == [
            answer_alone([place, 1, 2, 3, 4], 10) for place in range(6)
        ]
        assert max(sum(len(tokens) for _, tokens in one) for one in service.session.passes) <= 3

    def test_one_that_has_failed_does_not_wait(self):
        service = Service(slots=1, queue_limit=0)
        bad = service.start([1], 3)
        bad.error = KeyError("mine")
        assert service.answer([2], 3) == answer_alone([2], 3)
        service.finish(bad)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_in_the_middle_of_a_pass_can_end():
    service = Service(slots=2)
    request = service.start([1], 5, most_unread=None)
    entered, leave = service.hold_passes()
    driver = threading.Thread(target=service.scheduler.take, args=(request,))
    driver.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        # What the child's end and its garbage collector do.
        service.scheduler.withdraw(request)
        service.scheduler.release(request.scheduled)
        service.scheduler.end(request.scheduled)
        service.scheduler.close()
        os._exit(7)
    leave.set()
    driver.join()
    ends = time.monotonic() + 5
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < ends:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended != (0, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 7


@pytest.mark.parametrize("first", [11, 20, 29])
def test_an_interrupt_at_any_line_changes_no_other_answer(first):
    """It ends the request that makes the pass, and the one whose own part of it was under way: no other one."""

    def scenario(number):
        lines = 0
        service = Service(slots=2)
        prompts = [([*LONG[:60], 1], "t"), ([*LONG[:60], 2], "t"), ([3] * 20, None)]
        others = [service.start(prompt, 4, drafts=3, salt=salt, most_unread=None) for prompt, salt in prompts]
        maker = service.start([4] * 30, 4, salt="t", most_unread=None)

        def trace(frame, event, argument):
            nonlocal lines
            if not frame.f_globals.get("__name__", "").startswith("runtime."):
                return None
            lines += event == "line"
            if lines == number:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            while service.scheduler.take(maker).round.finish_reason is None:
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        service.finish(maker)
        for request, (prompt, _) in zip(others, prompts, strict=True):
            try:
                assert tokens_of(service, request) == answer_alone(prompt, 4)
            except KeyboardInterrupt:
                continue
        assert service.answer([*LONG[:60], 1, 1], 3, salt="t") == answer_alone([*LONG[:60], 1, 1], 3)
        assert service.scheduler.metrics().slots_used == 0
        return lines >= number

    number = first
    while scenario(number):
        number += 43
