"""A generation that is under way: its decoding, the steps that its consumer has not read yet, and when it began."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.loop import Decoding, Round
from runtime.slots import ScheduledSequence

# Steps that a stream may be ahead of its reader.
UNREAD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A round, the text that it brought, and the seconds that the sequence waited for it beside others."""

    round: Round
    text: str
    wait_seconds: float


class ActiveRequest:
    """What the scheduler knows of a generation: fields under the scheduler's lock, and a decoding for its passes."""

    def __init__(
        self,
        decoding: Decoding,
        scheduled: ScheduledSequence,
        *,
        take_text: Callable[[], str] = lambda: "",
        priority: int = 0,
        most_unread: int | None = UNREAD,
    ) -> None:
        """`priority`: lower ones go first. `most_unread`: steps ahead of the reader; None: all, to the end."""
        self.decoding, self.scheduled = decoding, scheduled
        self._take_text, self._most_unread = take_text, most_unread
        # The scheduler's: its priority, which rises when it waits for long, and the order in which requests came.
        self.rank = priority
        self.arrival = 0
        self.unread: deque[Step] = deque()
        self.error: BaseException | None = None
        # Its consumer waits for a step, and since when it did not.
        self.hungry = False
        self.asked_at = 0.0
        # A pass is being made with it.
        self.in_pass = False
        # It was in a pass; nothing is to come of it any more.
        self.started = self.ended = False
        # The number of its latest pass, and since when it could have been in one.
        self.last_pass = 0
        self._ready_at = time.perf_counter()
        self._waited = 0.0
        self.own_errors = _OwnErrors(self)

    @property
    def has_room(self) -> bool:
        """Whether its reader has not left too many steps unread."""
        return self._most_unread is None or len(self.unread) < self._most_unread

    @property
    def goes_on(self) -> bool:
        """Whether passes are to come; none for a sequence that was released: its positions are gone."""
        return not self.ended and self.error is None and not self.scheduled.released

    @property
    def wants_pass(self) -> bool:
        """Whether it can go on now."""
        return self.goes_on and self.has_room

    def waits_since(self, moment: float) -> bool:
        """Whether it could have been in a pass for so long (`time.perf_counter`), and was in none."""
        return self.wants_pass and self._ready_at <= moment

    def joins(self, now: float) -> None:
        """A pass begins with it."""
        self.started = True
        self._waited += max(0.0, now - self._ready_at)

    def leaves(self, now: float) -> None:
        """The pass is over."""
        self._ready_at = now

    def give(self, step: Round) -> None:
        """A step for the consumer."""
        self.unread.append(Step(round=step, text=self._take_text(), wait_seconds=self._waited))
        self._waited = 0.0
        # One that was withdrawn in the middle of this pass stays so.
        self.ended = self.ended or step.finish_reason is not None

    def interrupt(self) -> None:
        """End it in a step that emits nothing: outside of a pass."""
        self._waited += max(0.0, time.perf_counter() - self._ready_at)
        self.give(self.decoding.end())

    def take(self) -> Step:
        """The next step, of those that are there."""
        if not self.has_room:
            # From here on it waits for a pass again.
            self._ready_at = time.perf_counter()
        return self.unread.popleft()


class _OwnErrors:
    """What a request's own code raises is its consumer's; an interrupt of the whole thread is raised here as well."""

    __slots__ = ("_request",)

    def __init__(self, request: ActiveRequest) -> None:
        self._request = request

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self._request.error = error
        return error is None or isinstance(error, Exception)
