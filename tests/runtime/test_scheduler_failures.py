"""What goes wrong in one request, thread or process leaves the others' answers whole, and holds nobody up."""

import threading
import time

import pytest

from quasar.errors import GenerationError
from tests.runtime.scheduling import KINDS, Service, answer_alone

LONG = [place * 5 % KINDS for place in range(300)]


def tokens_of(service, request):
    return [token for step in service.stream(request) for token in step.round.tokens]


class TestWithdrawn:
    def test_a_step_given_meanwhile_does_not_bring_it_back(self):
        service = Service(slots=1)
        request = service.start([1], 50, most_unread=None)
        entered, leave = threading.Event(), threading.Event()
        run = service.session.run_batch

        def slow(batch, **options):
            entered.set()
            leave.wait(10)
            return run(batch, **options)

        service.session.run_batch = slow
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
