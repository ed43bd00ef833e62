"""Which sequences share the next pass, and who makes it.

Sequences that are there at the same time share passes: each has a slot of the session's KV cache, and a pass holds
chunks of prompts and decoding sequences with their drafts. Tokens do not depend on it: a position's bits come from its
own path alone. Where the session takes one sequence a pass, each pass is of another.

The thread that waits for a step makes the passes itself while nobody else waits; where several wait, a thread of the
scheduler's own makes them, for as long as there is work.
"""

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from engines.probes.row_invariance import RowInvariance
from quasar.errors import GenerationError, QueueFullError
from runtime.active_request import ActiveRequest, Step
from runtime.composition import PATIENCE, Composer
from runtime.control.controller import Knowledge
from runtime.kv_cache import KVCache
from runtime.metrics import Metrics, Tally
from runtime.refusals import CLOSED, ENGINE_CLOSED, GENERATING
from runtime.segment import Segment
from runtime.slots import FollowingCache, ScheduledSequence, Slots
from runtime.verifier import Verifier

# A request that no pass was for in so long goes before those of a higher priority that came after it.
AGED_SECONDS = 30.0
# A rank that no waiting reaches: of what looks whether the engine is well.
FIRST_OF_ALL = -(2**31)


class Scheduler:
    """Runs the requests of one session. Thread-safe; a pass must be short.

    Among requests of one priority those that came first go first; one that has a slot keeps it until it ends, is left
    alone by its consumer, or gives way to a higher priority. A low priority does not wait for ever (AGED_SECONDS).
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        exact: RowInvariance,
        knowledge: Callable[[], Knowledge] | None = None,
        max_batch_tokens: int | None = None,
        stall_seconds: float | None = None,
        queue_limit: int | None = None,
        following: Sequence[FollowingCache] = (),
    ) -> None:
        """What the session is asked for.

        Args:
            exact: which passes are exact on this machine.
            knowledge: the latencies that the budget of a pass goes by; None: none are known.
            max_batch_tokens: positions of a pass, at most; None: as many as the session takes.
            stall_seconds: seconds that a pass with chunks of prompts may take where others decode in it; None: those of
                a chunk alone, a tenth at most.
            queue_limit: requests that may wait beside those that the slots hold; None: any number.
            following: caches whose slots go with the session's.
        """
        session = verifier.session
        self._verifier, self._knowledge = verifier, knowledge
        self._queue_limit = queue_limit
        self._num_slots = session.num_slots
        self._slots = Slots(session, following)
        self._composer = Composer(
            session,
            self._slots,
            exact=exact,
            knowledge=knowledge,
            max_batch_tokens=max_batch_tokens,
            stall_seconds=stall_seconds,
        )
        self._process = os.getpid()
        self._changed = threading.Condition()
        # The thread that makes a pass, or uses the session alone; and whether somebody waits to use it alone.
        self._driver: int | None = None
        self._alone_waiting = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._active: list[ActiveRequest] = []
        self._released: list[ScheduledSequence] = []
        self._arrivals = 0
        self._tally = Tally()
        self._sequences: weakref.WeakSet[ScheduledSequence] = weakref.WeakSet()
        self._at_exit = False

    @property
    def shares_passes(self) -> bool:
        """Whether sequences go on in the same passes."""
        return self._composer.shares_passes

    def check_process(self) -> None:
        """Raise `GenerationError` in a process that was forked after the load: it has none of the session's threads."""
        if (here := os.getpid()) != self._process:
            raise GenerationError(
                f"the engine was loaded in process {self._process} and is used in process {here}, which was forked "
                "from it and has none of its threads: load the engine in the process that uses it"
            )

    def add(self, cache: KVCache, *, salt: str | None = None, outlives: bool = False) -> ScheduledSequence:
        """A sequence with a cache of its own; `salt` and `outlives` as `ScheduledSequence` has them."""
        sequence = ScheduledSequence(cache, salt=salt, outlives=outlives)
        with self._changed:
            self._sequences.add(sequence)
        return sequence

    def swapped_out_bytes(self) -> int:
        """Memory of all sequences that are swapped out."""
        with self._changed:
            swapped_out = [sequence.swapped_out for sequence in self._sequences]
        return sum(positions.nbytes for positions in swapped_out if positions is not None)

    def metrics(self) -> Metrics:
        """How things stand, and what was done since the load."""
        with self._changed:
            tally, going = self._tally, [one for one in self._active if one.goes_on]
            owners = self._slots.owners
            contract = self._verifier.contract
            return Metrics(
                running=sum(one.started for one in going),
                waiting=sum(not one.started for one in going),
                swapped_out=sum(one.swapped_out is not None for one in self._sequences),
                slots=self._num_slots,
                slots_used=len(owners),
                positions=self._num_slots * contract.max_length,
                positions_used=sum(one.cache.length for one in owners),
                passes=tally.passes,
                sequences_per_pass=dict(tally.sequences_per_pass),
                prompt_tokens=tally.prompt_tokens,
                drafted_tokens=tally.drafted_tokens,
                accepted_tokens=tally.accepted_tokens,
                emitted_tokens=tally.emitted_tokens,
                reused_tokens=tally.reused_tokens,
                pass_seconds=tally.pass_seconds,
                host_seconds=tally.host_seconds,
            )

    def begin(self, sequence: ScheduledSequence) -> None:
        """A generation of the sequence is to come; raises `GenerationError` if it has one already."""
        with self._changed:
            if sequence.generating:
                raise GenerationError(GENERATING)
            sequence.generating = True

    def end(self, sequence: ScheduledSequence) -> None:
        """The generation is over; the sequence stays in its slot until another one needs it."""
        if self._is_forked():
            return
        with self._changed:
            sequence.generating = False
            self._changed.notify_all()

    def submit(self, request: ActiveRequest) -> None:
        """Let a request go on in passes.

        Raises:
            QueueFullError: the slots are taken, and as many requests wait as may.
            GenerationError: the engine was closed, or this process is a fork of the one that loaded it.
        """
        self.check_process()
        with self._changed:
            if self._closed:
                raise GenerationError(ENGINE_CLOSED)
            going = sum(one.goes_on for one in self._active)
            if self._queue_limit is not None and going >= self._num_slots + self._queue_limit:
                raise QueueFullError(
                    f"{going} requests are under way or wait; max_sequences {self._num_slots} and queue_limit "
                    f"{self._queue_limit} allow no more: try again later"
                )
            if not self._at_exit:
                # A daemon thread that is inside the library when the interpreter ends may bring the process down, the
                # scheduler's own or a consumer's.
                self._at_exit = True
                atexit.register(_close_at_exit, weakref.ref(self))
            self._arrivals += 1
            request.arrival = self._arrivals
            self._active.append(request)
            self._sort()

    def withdraw(self, request: ActiveRequest) -> None:
        """Make no more passes with a request; waits for the one that is being made with it."""
        if self._is_forked():
            return
        with self._changed:
            request.ended = True
            # An interrupted pass may not have said that it is over; without a driver there is none.
            while request.in_pass and self._driver not in (None, threading.get_ident()):
                self._changed.wait()
            if request in self._active:
                self._active.remove(request)
            self._changed.notify_all()

    def release(self, sequence: ScheduledSequence) -> None:
        """The sequence is needed no more."""
        if self._is_forked():
            return
        with self._changed:
            sequence.generating, sequence.released = False, True
            self._released.append(sequence)
            if self._driver is None:
                self._forget_released()
            self._changed.notify_all()

    def take(self, request: ActiveRequest) -> Step:
        """The request's next step; waits for it, and makes the passes until then where nobody else does.

        Raises:
            GenerationError: the engine was closed, the sequence released, this thread is inside a pass of the engine,
                or this process is a fork of the one that loaded it. And what the request's own pass raised.
        """
        self.check_process()
        while True:
            drives = False
            try:
                with self._changed:
                    request.asked_at, request.hungry = time.monotonic(), True
                    try:
                        self._refuse_own_pass()
                        if request.unread:
                            return request.take()
                        self._check_open(request)
                        drives = self._drives(request)
                        if drives:
                            self._driver = threading.get_ident()
                        elif self._is_interrupted(request):
                            request.interrupt()
                            return request.take()
                        else:
                            self._changed.wait(PATIENCE / 2)
                    finally:
                        request.hungry = drives
                if drives and not self._drive():
                    # Slots that others leave alone are to be had in a moment.
                    time.sleep(0.001)
            finally:
                # An interrupt that came before the pass, or in the middle of its end, must not leave it to nobody.
                if drives:
                    self._leave_own()

    @contextmanager
    def alone(self, sequence: ScheduledSequence) -> Iterator[None]:
        """Have the session, with the sequence in its slot, and no pass meanwhile.

        Raises `GenerationError` as `take`.
        """
        self.check_process()
        drives = False
        try:
            with self._changed:
                self._refuse_own_pass()
                self._alone_waiting += 1
                try:
                    while self._driver is not None and not self._closed:
                        self._changed.wait()
                finally:
                    self._alone_waiting -= 1
                    self._changed.notify_all()
                if self._closed:
                    raise GenerationError(ENGINE_CLOSED)
                if sequence.released:
                    raise GenerationError(CLOSED)
                drives = True
                self._driver = threading.get_ident()
                self._forget_released()
            self._slots.bring(sequence, lambda other: int(other.generating))
            yield
        finally:
            if drives:
                self._leave_own()

    def close(self) -> None:
        """Wait for the pass that is being made, and free the session; every later one is refused."""
        if self._is_forked():
            return
        with self._changed:
            if self._closed:
                return
            self._refuse_own_pass()
            self._closed = True
            self._changed.notify_all()
            while self._driver is not None:
                self._changed.wait()
            self._verifier.session.close()
            self._changed.notify_all()

    def _drives(self, request: ActiveRequest) -> bool:
        """Whether this request's consumer makes the next pass. Starts the scheduler's thread where it is needed."""
        if self._driver is not None or self._alone_waiting:
            return False
        if self._thread is None and any(other.hungry for other in self._active if other is not request):
            thread = threading.Thread(target=self._serve, name="quasar-engine", daemon=True)
            # Where no thread is to be had, consumers go on making the passes themselves.
            with contextlib.suppress(RuntimeError, MemoryError):
                thread.start()
                self._thread = thread
        return self._thread is None

    def _serve(self) -> None:
        """Make passes while there are requests that can go on."""
        while True:
            with self._changed:
                while (self._driver is not None or self._alone_waiting) and not self._closed:
                    self._changed.wait()
                if self._closed or not any(request.wants_pass for request in self._active):
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._driver = threading.get_ident()
            moved = True
            with contextlib.suppress(BaseException):
                # What a request's own code raises is its consumer's; this thread is everybody's.
                moved = self._drive()
            if not moved:
                with self._changed:
                    self._changed.wait(PATIENCE / 2)

    def _drive(self) -> bool:
        """Make a pass, as the driver; False where no sequence could go on."""
        batch: list[ActiveRequest] = []
        try:
            with self._changed:
                self._forget_released()
                self._raise_ranks()
                everyone = list(self._active)
                batch = [request for request in everyone if request.wants_pass]
                for request in everyone:
                    request.in_pass = request in batch
            return self._make_pass(batch, everyone)
        except Exception as error:  # nobody's in particular: whoever waits must hear of it
            for request in batch:
                request.error = request.error or error
            return True
        finally:
            with self._changed:
                for request in batch:
                    request.in_pass = False
            self._leave()

    def _sort(self) -> None:
        self._active.sort(key=lambda one: (one.rank, one.arrival))

    def _raise_ranks(self) -> None:
        """Whoever waited for long counts as urgent as the most urgent one from now on, so that nobody starves."""
        ranks = [one.rank for one in self._active if one.rank > FIRST_OF_ALL]
        first = min(ranks, default=0)
        if first == max(ranks, default=0):
            return
        moment = time.perf_counter() - AGED_SECONDS
        aged = [one for one in self._active if one.rank > first and one.waits_since(moment)]
        for one in aged:
            one.rank = first
        if aged:
            self._sort()

    def _leave_own(self) -> None:
        """As `_leave`, unless this thread has left already."""
        if self._driver == threading.get_ident():
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._driver = None
            self._changed.notify_all()

    def _make_pass(self, batch: list[ActiveRequest], everyone: list[ActiveRequest]) -> bool:
        going = [request for request in batch if self._goes_on(request)]
        chosen = self._composer.choose(going, everyone)
        with self._changed:
            for request in batch:
                request.in_pass = request in chosen
            if len(going) < len(batch):
                self._changed.notify_all()
        if not chosen:
            return len(going) < len(batch)
        start, before = time.perf_counter(), self._tally.pass_seconds
        for request in chosen:
            request.last_pass = self._tally.passes + 1
            request.joins(start)
        fed = self._composer.segments(chosen)
        self._tally.prompt_tokens += sum(len(segment.tokens) for one, segment in fed if not one.decoding.answered)
        if fed:
            self._verify(fed)
        now = time.perf_counter()
        self._tally.host_seconds += now - start - (self._tally.pass_seconds - before)
        for request in chosen:
            request.leaves(now)
            if not request.goes_on and not request.scheduled.outlives:
                self._slots.leave(request.scheduled)
        return True

    def _goes_on(self, request: ActiveRequest) -> bool:
        """False where the request was interrupted, which ends it."""
        # A signal of the caller's may raise; its consumer gets that.
        with request.own_errors:
            if request.decoding.interrupted() is None:
                return True
            request.interrupt()
        return False

    def _verify(self, fed: list[tuple[ActiveRequest, Segment]]) -> None:
        """Make the pass, and let each sequence take in what it brought."""
        start = time.perf_counter()
        try:
            targets = self._verifier.run([segment for _, segment in fed])
        except Exception as error:
            if len(fed) == 1:
                fed[0][0].error = error
            else:
                # Whose fault it is shows when each has a pass of its own.
                for one in fed:
                    self._verify([one])
            return
        seconds = time.perf_counter() - start
        self._tally.count_pass(len(fed), seconds)
        if len(fed) > 1 and self._knowledge is not None:
            self._knowledge().latency.correct_pass(
                [(segment.cache_length, len(segment.tokens)) for _, segment in fed], seconds
            )
        for (request, segment), target in zip(fed, targets, strict=True):
            # To the end for each, so that an interrupt loses no step of one that has taken it in: it ends this one.
            with request.own_errors:
                step = request.decoding.absorb(segment, target, seconds=seconds, alone=len(fed) == 1)
                if step is not None:
                    with self._changed:
                        request.give(step)
                        self._tally.count_round(step)

    def _forget_released(self) -> None:
        # The garbage collector may close a stream meanwhile, in this very thread.
        released, self._released = self._released, []
        for sequence in released:
            self._slots.release(sequence)

    def _check_open(self, request: ActiveRequest) -> None:
        if request.error is not None:
            raise request.error
        if self._closed:
            raise GenerationError(ENGINE_CLOSED)
        if request.scheduled.released:
            raise GenerationError(CLOSED)

    def _is_forked(self) -> bool:
        """Whether this process is a fork: the lock and the pass are of threads that it does not have."""
        return os.getpid() != self._process

    def _is_interrupted(self, request: ActiveRequest) -> bool:
        return not request.in_pass and not request.ended and request.decoding.interrupted() is not None

    def _refuse_own_pass(self) -> None:
        if self._driver == threading.get_ident():
            raise GenerationError(
                "a hook or a drafter used the engine that is calling it: nothing can run inside one of its own steps"
            )


def _close_at_exit(scheduler: "weakref.ref[Scheduler]") -> None:
    alive = scheduler()
    if alive is not None:
        alive.close()
