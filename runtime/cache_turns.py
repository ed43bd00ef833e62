"""Who uses the session's one KV cache: texts take turns, a step at a time.

A text that is in the middle of a step, or that asks for its next one soon, keeps the cache. One that its consumer has
left alone for a moment gives it up to whoever waits: its rows move to memory of their own and come back for its next
step, bit for bit. So any number of threads and open streams share an engine without waiting for each other's consumers.
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

# Seconds that a text keeps the cache between two of its steps while others wait.
PATIENCE = 0.05
CLOSED = "this conversation is closed: make another with engine.session()"
GENERATING = "this conversation is generating already: finish or close that stream first"
ENGINE_CLOSED = "this engine is closed: load it again with runtime.load"


class Tenant:
    """A text that uses the cache in turns. `parked`: its rows while another text has the session's memory."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.parked: CacheRows | None = None
        # From `begin` to `end`; and whether a step was made since then.
        self.generating = False
        self.started = False
        # Its rows are gone for good.
        self.released = False


class CacheTurns:
    """The turns on one session. Thread-safe; a turn must be short: one prefill or one round.

    Texts that wait have the cache in the order in which they came. One that has made a step goes on before them, until
    it ends or is left alone.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._process = os.getpid()
        self._changed = threading.Condition()
        # The thread that is in the middle of a step.
        self._owner: int | None = None
        self._closed = False
        self._resident: Tenant | None = None
        self._left_at = 0.0
        self._waiting: deque[object] = deque()
        self._tenants: weakref.WeakSet[Tenant] = weakref.WeakSet()

    def check_process(self) -> None:
        """Raise `GenerationError` in a process that was forked after the load: it has none of the session's threads."""
        if (here := os.getpid()) != self._process:
            raise GenerationError(
                f"the engine was loaded in process {self._process} and is used in process {here}, which was forked "
                "from it and has none of its threads: load the engine in the process that uses it"
            )

    def new_tenant(self, cache: KVCache) -> Tenant:
        """A text over rows of its own."""
        tenant = Tenant(cache)
        with self._changed:
            self._tenants.add(tenant)
        return tenant

    def parked_bytes(self) -> int:
        """Memory of all parked rows."""
        with self._changed:
            parked = [tenant.parked for tenant in self._tenants]
        return sum(rows.nbytes for rows in parked if rows is not None)

    @contextmanager
    def turn(self, tenant: Tenant, interrupted: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Have the cache, with the tenant's rows in it; yields False if `interrupted` says so while others have it.

        Raises:
            GenerationError: the engine was closed, the tenant released, this thread is inside a step of the engine, or
            this process is a fork of the one that loaded it.
        """
        self.check_process()
        if not self._enter(tenant, interrupted):
            yield False
            return
        try:
            self._bring(tenant)
            yield True
        finally:
            self._leave(tenant)

    def begin(self, tenant: Tenant) -> None:
        """The first step of a generation is to come; raises `GenerationError` if the text has one that goes on."""
        with self._changed:
            if tenant.generating:
                raise GenerationError(GENERATING)
            tenant.generating, tenant.started = True, False

    def end(self, tenant: Tenant) -> None:
        """The generation is over; its rows stay until another text needs the place."""
        with self._changed:
            tenant.generating = tenant.started = False
            self._changed.notify_all()

    def release(self, tenant: Tenant) -> None:
        """The tenant's rows are needed no more."""
        with self._changed:
            tenant.generating = tenant.started = False
            tenant.parked, tenant.released = None, True
            if self._resident is tenant:
                self._resident = None
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for the step that is running, and free the session; every later turn is refused."""
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

    def _enter(self, tenant: Tenant, interrupted: Callable[[], bool]) -> bool:
        ticket = object()
        with self._changed:
            self._refuse_own_step()
            self._waiting.append(ticket)
            try:
                while True:
                    if self._closed:
                        raise GenerationError(ENGINE_CLOSED)
                    if tenant.released:
                        raise GenerationError(CLOSED)
                    if self._owner is None and self._may_enter(tenant, ticket):
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

    def _may_enter(self, tenant: Tenant, ticket: object) -> bool:
        """Whether it is this text's turn, while nobody makes a step."""
        if self._resident is tenant and tenant.started:
            return True
        return self._waiting[0] is ticket and self._seconds_to_wait() <= 0

    def _refuse_own_step(self) -> None:
        if self._owner == threading.get_ident():
            raise GenerationError(
                "a hook or a drafter used the engine that is calling it: nothing can run inside one of its own steps"
            )

    def _seconds_to_wait(self) -> float:
        """Until the resident text may be moved."""
        if self._resident is None or not self._resident.started:
            return 0.0
        return self._left_at + PATIENCE - time.monotonic()

    def _bring(self, tenant: Tenant) -> None:
        """Park the resident's rows and write the tenant's. Runs while the turn is this tenant's alone."""
        other = self._resident
        if other is tenant:
            return
        if other is not None:
            rows = self._session.read_rows(0, other.cache.length)
            with self._changed:
                other.parked = None if other.released else rows
        self._resident = None
        if tenant.parked is not None:
            self._session.write_rows(0, tenant.parked[..., : tenant.cache.length, :])
            tenant.parked = None
        self._resident = tenant

    def _leave(self, tenant: Tenant) -> None:
        with self._changed:
            self._owner = None
            self._left_at = time.monotonic()
            tenant.started = tenant.generating
            if tenant.released and self._resident is tenant:
                self._resident = None
            self._changed.notify_all()
