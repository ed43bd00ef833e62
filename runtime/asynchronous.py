"""Streams for asyncio: each generates in a thread of its own, and is cancelled when its consumer goes away."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from runtime.events import Event
from runtime.generation_options import Signal

# Events that may be unread, and how often a thread that waits for its reader looks whether there still is one.
_UNREAD = 8
_LOOK_SECONDS = 0.1


class _Either:
    """Set when the consumer is gone, or when the caller's own signal is."""

    def __init__(self, own: Signal | None) -> None:
        self.gone = threading.Event()
        self._own = own

    def is_set(self) -> bool:
        return self.gone.is_set() or (self._own is not None and self._own.is_set())


async def in_thread(start: Callable[[Signal], Iterator[Event]], cancel: Signal | None) -> AsyncIterator[Event]:
    """The events of a stream that `start` makes, given what cancels it; its errors are raised here.

    The thread is a few events ahead of its consumer at most.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(_UNREAD)
    signal = _Either(cancel)

    def give(item: Event | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, item)
        except RuntimeError:
            # The event loop is closed: nobody waits for anything.
            signal.gone.set()

    def pump() -> None:
        try:
            # A long prompt takes its time to become tokens: not on the event loop.
            for event in start(signal):
                while not room.acquire(timeout=_LOOK_SECONDS) and not signal.gone.is_set():
                    continue
                give(event)
            give(None)
        except BaseException as error:  # raised where the events are awaited
            give(error)

    thread = threading.Thread(target=pump, name="quasar-stream", daemon=True)
    thread.start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item
    finally:
        signal.gone.set()


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    """All events."""
    return [event async for event in events]
