"""Streams in threads, and what becomes of those that nobody waits for any more."""

import asyncio
import threading

import pytest

from runtime.asynchronous import ThreadedStreams


def test_what_was_cancelled_before_it_began_is_not_begun():
    """The prompt of the first cannot be read: the consumer leaves, and no other prompt is read for nothing."""
    begun, ended = [], []

    async def consume():
        cancel, may_go_on = threading.Event(), threading.Event()

        def fail():
            begun.append("fails")
            raise ValueError("no prompt")

        def late():
            begun.append("late")
            return iter(())

        streams = ThreadedStreams([fail, late], cancel, lambda: ended.append(True))
        pump = streams._pump

        def one_by_one(index):
            if index:
                may_go_on.wait(10)
            pump(index)

        streams._pump = one_by_one
        streams.start()
        with pytest.raises(ValueError, match="no prompt"):
            await streams.begun()
        cancel.set()
        may_go_on.set()
        while len(ended) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(consume(), 30))
    assert begun == ["fails"]
    assert len(ended) == 2
