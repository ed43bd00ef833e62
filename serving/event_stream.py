"""Server-sent events: `data: JSON`, an empty line after each, `data: [DONE]` at the end.

The framing is two lines, so no library has it: one that has would also watch for the server's end, which is
`serving.lifecycle`'s.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
# A comment, which clients leave out: proxies and clients close what says nothing for long.
STILL_HERE = b": waiting\n\n"
# It is sent after so long without an event.
QUIET_SECONDS = 15.0


def event(value: Any) -> bytes:
    """One event; its JSON is ASCII, so that no character in it can end a line."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Sends what a generator yields; calls `ended` when everything was sent or the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], ended: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        # The second one is for nginx.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._chunks, self._ended = chunks, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        """Send until the end, or until the client is gone."""
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(wait_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended()
            both = [task for task in (sending, gone) if not task.done()]
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        if sending.done() and not sending.cancelled():
            sending.result()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._chunks):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def wait_until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        continue
