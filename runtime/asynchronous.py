"""From streams to asyncio: each generates in a thread of its own, and is cancelled when its consumer goes away.

A thread for each costs some 60 microseconds of CPU for a token, beside passes of milliseconds; prompts are rendered and
tokenized there, too, so that the event loop never waits for one.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from runtime.events import Event
from runtime.generation_options import Signal

# Events that may be unread, and how often a thread that waits for its reader looks whether there still is one.
_UNREAD = 4
_LOOK_SECONDS = 0.1

# Checks and encodes a prompt now, and generates when the events are asked for.
Start = Callable[[], Iterator[Event]]


@dataclass(frozen=True, slots=True)
class _Begun:
    """The prompt was read, and every option can be honoured."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """The thread is over; `error`: what it raised."""

    error: BaseException | None


class _NotBegunError(Exception):
    """It was cancelled before it began; whoever awaits the streams has left, or is told of the end by another word."""


class ThreadedStreams:
    """Events of several streams, as they come, with the number of the stream.

    Args:
        starts: each makes a stream; called in the stream's thread.
        cancel: set by whoever leaves the events before their end; the streams should end by it, too.
        ended: called in the event loop for each stream when its thread is over.
    """

    def __init__(
        self, starts: Sequence[Start], cancel: threading.Event, ended: Callable[[], None] | None = None
    ) -> None:
        self._starts, self._cancel, self._ended = starts, cancel, ended
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event | _Begun | _Ended]] = asyncio.Queue()
        self._room = [threading.Semaphore(_UNREAD) for _ in starts]
        self._left = len(starts)
        # Of events that came before every stream had begun.
        self._early: list[tuple[int, Event]] = []

    def start(self) -> None:
        """Start the threads; a stream whose thread is not to be had ends with an error."""
        for index in range(len(self._starts)):
            try:
                threading.Thread(target=self._pump, args=(index,), name="quasar-stream", daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                self._take(index, _Ended(error))

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

    async def events(self, quiet: float | None = None) -> AsyncIterator[tuple[int, Event | None]]:
        """The events, after `begun` or without it, each with the number of its stream; raises what a stream raised.

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
            if self._cancel.is_set():
                # The prompt need not be read, nor a grammar compiled.
                raise _NotBegunError("the answer was cancelled before it began")
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

    def _give(self, index: int, item: Event | _Begun | _Ended) -> None:
        try:
            self._loop.call_soon_threadsafe(self._take, index, item)
        except RuntimeError:
            # The event loop is closed: nobody waits for anything.
            self._cancel.set()

    def _take(self, index: int, item: Event | _Begun | _Ended) -> None:
        """Runs in the event loop."""
        self._queue.put_nowait((index, item))
        if self._ended is not None and isinstance(item, _Ended):
            self._ended()


class _Either:
    """Set when the consumer is gone, or when the caller's own signal is."""

    def __init__(self, gone: threading.Event, own: Signal | None) -> None:
        self._gone, self._own = gone, own

    def is_set(self) -> bool:
        return self._gone.is_set() or (self._own is not None and self._own.is_set())


async def in_thread(start: Callable[[Signal], Iterator[Event]], cancel: Signal | None) -> AsyncIterator[Event]:
    """The events of a stream that `start` makes, given what cancels it; its errors are raised here."""
    gone = threading.Event()
    streams = ThreadedStreams([lambda: start(_Either(gone, cancel))], gone)
    streams.start()
    try:
        async for _, event in streams.events():
            if event is not None:
                yield event
    finally:
        gone.set()


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    """All events."""
    return [event async for event in events]
