"""A request and its answer as they travel between the ingress and a replica: ASGI's own words for them."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

# A replica that has nothing to say says so after so many seconds: its process lives.
BEAT_SECONDS = 10.0
# Seconds that an answer has to end itself when nobody waits for it.
_LAST_WORDS = 5.0
_SCOPE = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardedRequest:
    """A request whose body has arrived; `scope`: what of ASGI's scope is data."""

    scope: dict[str, Any]
    body: bytes


def forwarded(scope: Scope, body: bytes) -> ForwardedRequest:
    """The request of a scope."""
    return ForwardedRequest(scope={name: scope[name] for name in _SCOPE if name in scope}, body=body)


async def answered(app: ASGIApp, request: ForwardedRequest) -> AsyncGenerator[Message | None, None]:
    """The messages that an application answers with, as they come; None where none came for `BEAT_SECONDS`.

    Who leaves the generator before its end is, to the application, a client that has closed its connection.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    unread = [request.body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, **request.scope}
    running = asyncio.ensure_future(app(scope, receive, send))
    running.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while True:
            try:
                async with asyncio.timeout(BEAT_SECONDS):
                    message = await messages.get()
            except TimeoutError:
                yield None
                continue
            if message is None:
                break
            yield message
        running.result()
    finally:
        left.set()
        if not running.done():
            await asyncio.wait({running}, timeout=_LAST_WORDS)
            running.cancel()
