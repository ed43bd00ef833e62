"""From the runtime's streams to asyncio: the generations of one request, each in a thread of its own.

A thread for each costs some 60 microseconds of CPU for a token, beside passes of milliseconds; prompts are rendered and
tokenized there, too, so that the event loop never waits for one.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from runtime import Event

# Events that may be unread, and how often a thread that waits for its reader looks whether there still is one.
_UNREAD = 4
_LOOK_SECONDS = 0.1
# After so long without an event, a stream's reader is told that there is none.
QUIET_SECONDS = 15.0

# Checks and encodes a prompt now, and generates when the events are asked for.
Start = Callable[[], Iterator[Event]]


@dataclass(frozen=True, slots=True)
class _Begun:
    """The prompt was read, and every option can be honoured."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """The thread is over; `error`: what it raised."""

    error: BaseException | None


class Generations:
    """Events of several generations, as they come, with the number of the generation.

    Args:
        starts: each makes a stream; called in the stream's thread.
        cancel: ends every generation within a round; whoever leaves the events before their end sets it.
        ended: called in the event loop for each generation when its thread is over.
    """

    def __init__(self, starts: Sequence[Start], cancel: threading.Event, ended: Callable[[], None]) -> None:
        self._starts, self._cancel, self._ended = starts, cancel, ended
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event | _Begun | _Ended]] = asyncio.Queue()
        self._room = [threading.Semaphore(_UNREAD) for _ in starts]
        self._left = len(starts)
        # Of events that came before every generation had begun.
        self._early: list[tuple[int, Event]] = []

    def start(self) -> None:
        """Start the threads; a generation whose thread is not to be had ends with an error."""
        for index in range(len(self._starts)):
            try:
                threading.Thread(target=self._pump, args=(index,), name="quasar-request", daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                self._queue.put_nowait((index, _Ended(error)))
                self._ended()

    async def begun(self) -> None:
        """Wait until all prompts are read and checked; raises what the first one that failed raised."""
        waiting = len(self._starts)
        while waiting:
            index, item = await self._queue.get()
            if isinstance(item, _Begun):
                waiting -= 1
            elif isinstance(item, Event):
                self._early.append((index, item))
            elif item.error is not None:
                raise item.error
            else:
                self._left -= 1

    async def events(self, quiet: float = QUIET_SECONDS) -> AsyncIterator[tuple[int, Event | None]]:
        """The events, after `begun`, each with the number of its generation; raises what a generation raised.

        None instead of an event: nothing came for `quiet` seconds.
        """
        for index, event in self._early:
            self._room[index].release()
            yield index, event
        while self._left:
            try:
                async with asyncio.timeout(quiet):
                    index, item = await self._queue.get()
            except TimeoutError:
                yield 0, None
                continue
            if isinstance(item, Event):
                self._room[index].release()
                yield index, item
            elif isinstance(item, _Ended):
                self._left -= 1
                if item.error is not None:
                    raise item.error

    def _pump(self, index: int) -> None:
        error: BaseException | None = None
        try:
            events = self._starts[index]()
            self._give(index, _Begun())
            # A stream that is a generator is closed with its thread.
            with contextlib.ExitStack() as stack:
                if hasattr(events, "close"):
                    stack.callback(events.close)
                for event in events:
                    while not self._room[index].acquire(timeout=_LOOK_SECONDS) and not self._cancel.is_set():
                        continue
                    self._give(index, event)
        except BaseException as raised:  # raised where the events are awaited
            error = raised
        self._give(index, _Ended(error))
        # A loop that is closed counts nothing any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended)

    def _give(self, index: int, item: Event | _Begun | _Ended) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))
        except RuntimeError:
            # The event loop is closed: nobody waits for anything.
            self._cancel.set()
