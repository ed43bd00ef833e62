"""Which sequence the next pass is for. The session's KV cache has one slot, so a pass holds one sequence.

A sequence that is in the middle of a step, or that asks for its next one soon, keeps the slot. One that its consumer
has left alone for a moment gives it up to whoever waits: it is swapped out to memory of its own and comes back for its
next step, bit for bit. So any number of threads and open streams share an engine without waiting for each other's
consumers.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.cache_rows import CacheRows
from engines.session import Session
from quasar.errors import GenerationError
from runtime.kv_cache import KVCache

# Seconds that a sequence keeps the slot between two of its steps while others wait.
PATIENCE = 0.05
CLOSED = "this conversation is closed: make another with engine.session()"
GENERATING = "this conversation is generating already: finish or close that stream first"
ENGINE_CLOSED = "this engine is closed: load it again with runtime.load"


class ScheduledSequence:
    """A sequence and its cache. `swapped_out`: its cache positions while another sequence has the slot."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.swapped_out: CacheRows | None = None
        # From `begin` to `end`; and whether a step was made since then.
        self.generating = False
        self.started = False
        # Its cache is gone for good.
        self.released = False


class Scheduler:
    """Decides who has the slot of one session. Thread-safe; a step must be short: one prefill or one round.

    Sequences that wait have the slot in the order in which they came. One that has made a step goes on before them,
    until it ends or is left alone.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._process = os.getpid()
        self._changed = threading.Condition()
        # The thread that is in the middle of a step.
        self._owner: int | None = None
        self._closed = False
        self._resident: ScheduledSequence | None = None
        self._left_at = 0.0
        self._waiting: deque[object] = deque()
        self._sequences: weakref.WeakSet[ScheduledSequence] = weakref.WeakSet()

    def check_process(self) -> None:
        """Raise `GenerationError` in a process that was forked after the load: it has none of the session's threads."""
        if (here := os.getpid()) != self._process:
            raise GenerationError(
                f"the engine was loaded in process {self._process} and is used in process {here}, which was forked "
                "from it and has none of its threads: load the engine in the process that uses it"
            )

    def add(self, cache: KVCache) -> ScheduledSequence:
        """A sequence with a cache of its own."""
        sequence = ScheduledSequence(cache)
        with self._changed:
            self._sequences.add(sequence)
        return sequence

    def swapped_out_bytes(self) -> int:
        """Memory of all sequences that are swapped out."""
        with self._changed:
            swapped_out = [sequence.swapped_out for sequence in self._sequences]
        return sum(positions.nbytes for positions in swapped_out if positions is not None)

    @contextmanager
    def step(self, sequence: ScheduledSequence, interrupted: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Have the slot, with the sequence in it; yields False if `interrupted` says so while others have it.

        Raises:
            GenerationError: the engine was closed, the sequence released, this thread is inside a step of the engine,
            or this process is a fork of the one that loaded it.
        """
        self.check_process()
        if not self._enter(sequence, interrupted):
            yield False
            return
        try:
            self._bring(sequence)
            yield True
        finally:
            self._leave(sequence)

    def begin(self, sequence: ScheduledSequence) -> None:
        """The first step of a generation is to come; raises `GenerationError` if the sequence has one already."""
        with self._changed:
            if sequence.generating:
                raise GenerationError(GENERATING)
            sequence.generating, sequence.started = True, False

    def end(self, sequence: ScheduledSequence) -> None:
        """The generation is over; the sequence stays in the slot until another one needs it."""
        with self._changed:
            sequence.generating = sequence.started = False
            self._changed.notify_all()

    def release(self, sequence: ScheduledSequence) -> None:
        """The sequence is needed no more."""
        with self._changed:
            sequence.generating = sequence.started = False
            sequence.swapped_out, sequence.released = None, True
            if self._resident is sequence:
                self._resident = None
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for the step that is running, and free the session; every later one is refused."""
        with self._changed:
            if self._closed:
                return
            self._refuse_own_step()
            self._closed = True
            while self._owner is not None:
                self._changed.wait()
            self._resident = None
            self._session.close()
            self._changed.notify_all()

    def _enter(self, sequence: ScheduledSequence, interrupted: Callable[[], bool]) -> bool:
        ticket = object()
        with self._changed:
            self._refuse_own_step()
            self._waiting.append(ticket)
            try:
                while True:
                    if self._closed:
                        raise GenerationError(ENGINE_CLOSED)
                    if sequence.released:
                        raise GenerationError(CLOSED)
                    if self._owner is None and self._may_enter(sequence, ticket):
                        self._owner = threading.get_ident()
                        return True
                    if interrupted():
                        return False
                    # Half the patience at most, so that an interruption is seen soon.
                    left = self._seconds_to_wait() if self._owner is None else PATIENCE
                    self._changed.wait(min(max(left, 0.001), PATIENCE / 2))
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _may_enter(self, sequence: ScheduledSequence, ticket: object) -> bool:
        """Whether the next step is this sequence's, while nobody makes one."""
        if self._resident is sequence and sequence.started:
            return True
        return self._waiting[0] is ticket and self._seconds_to_wait() <= 0

    def _refuse_own_step(self) -> None:
        if self._owner == threading.get_ident():
            raise GenerationError(
                "a hook or a drafter used the engine that is calling it: nothing can run inside one of its own steps"
            )

    def _seconds_to_wait(self) -> float:
        """Until the sequence in the slot may be swapped out."""
        if self._resident is None or not self._resident.started:
            return 0.0
        return self._left_at + PATIENCE - time.monotonic()

    def _bring(self, sequence: ScheduledSequence) -> None:
        """Swap the sequence in the slot out, and this one in. Runs in a step of this sequence."""
        other = self._resident
        if other is sequence:
            return
        if other is not None:
            positions = self._session.read_rows(0, other.cache.length)
            with self._changed:
                other.swapped_out = None if other.released else positions
        self._resident = None
        if sequence.swapped_out is not None:
            self._session.write_rows(0, sequence.swapped_out[..., : sequence.cache.length, :])
            sequence.swapped_out = None
        self._resident = sequence

    def _leave(self, sequence: ScheduledSequence) -> None:
        with self._changed:
            self._owner = None
            self._left_at = time.monotonic()
            sequence.started = sequence.generating
            if sequence.released and self._resident is sequence:
                self._resident = None
            self._changed.notify_all()
