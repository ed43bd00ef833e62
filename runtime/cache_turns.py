"""Who uses the session's one KV cache: texts take turns, a step at a time.

A text that is in the middle of a step, or that asks for its next one soon, keeps the cache. One that its consumer has
left alone for a moment gives it up to whoever waits: its rows move to memory of their own and come back for its next
step, bit for bit. So any number of threads and open streams share an engine without waiting for each other's consumers.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.cache_rows import Float32
from engines.session import Session
from quasar.errors import GenerationError
from runtime.kv_cache import KVCache

# Seconds that a text keeps the cache between two of its steps while others wait.
PATIENCE = 0.05
GENERATING = "this conversation is generating already: finish or close that stream first"


class Tenant:
    """A text that uses the cache in turns. `parked`: its rows while another text has the session's memory."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.parked: Float32 | None = None
        # Between the first and the last step of a generation.
        self.generating = False

    @property
    def parked_bytes(self) -> int:
        """Memory of the parked rows."""
        return 0 if self.parked is None else self.parked.nbytes


class CacheTurns:
    """The turns on one session. Thread-safe; a turn must be short: one prefill or one round."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._resident: Tenant | None = None
        self._left_at = 0.0

    @contextmanager
    def turn(self, tenant: Tenant, interrupted: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Have the cache, with the tenant's rows in it; yields False if `interrupted` says so while others have it.

        Raises:
            GenerationError: the engine was closed.
        """
        if not self._enter(tenant, interrupted):
            yield False
            return
        try:
            self._bring(tenant)
            yield True
        finally:
            self._leave()

    def begin(self, tenant: Tenant) -> None:
        """The first step of a generation is to come; raises `GenerationError` if the text has one that goes on."""
        with self._changed:
            if tenant.generating:
                raise GenerationError(GENERATING)
            tenant.generating = True

    def end(self, tenant: Tenant) -> None:
        """The generation is over; its rows stay until another text needs the place."""
        with self._changed:
            tenant.generating = False
            self._changed.notify_all()

    def release(self, tenant: Tenant) -> None:
        """The tenant's rows are needed no more."""
        with self._changed:
            tenant.generating, tenant.parked = False, None
            if self._resident is tenant:
                self._resident = None
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for the step that is running, and free the session; every later turn is refused."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            while self._busy:
                self._changed.wait()
            self._resident = None
            self._session.close()
            self._changed.notify_all()

    def _enter(self, tenant: Tenant, interrupted: Callable[[], bool]) -> bool:
        with self._changed:
            while True:
                if self._closed:
                    raise GenerationError("this engine is closed: load it again with runtime.load")
                if not self._busy and (self._resident is tenant or self._seconds_to_wait() <= 0):
                    self._busy = True
                    return True
                if interrupted():
                    return False
                # Half the patience at most, so that an interruption is seen soon.
                self._changed.wait(PATIENCE / 2 if self._busy else min(self._seconds_to_wait(), PATIENCE / 2))

    def _seconds_to_wait(self) -> float:
        """Until the resident text may be moved."""
        if self._resident is None or not self._resident.generating:
            return 0.0
        return self._left_at + PATIENCE - time.monotonic()

    def _bring(self, tenant: Tenant) -> None:
        """Park the resident's rows and write the tenant's. Runs while the turn is this tenant's alone."""
        other = self._resident
        if other is tenant:
            return
        if other is not None:
            other.parked = self._session.read_rows(0, other.cache.length)
        self._resident = None
        if tenant.parked is not None:
            self._session.write_rows(0, tenant.parked[..., : tenant.cache.length, :])
            tenant.parked = None
        self._resident = tenant

    def _leave(self) -> None:
        with self._changed:
            self._busy = False
            self._left_at = time.monotonic()
            self._changed.notify_all()
