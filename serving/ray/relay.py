"""The ingress: an ASGI application that reads a request, chooses how it is routed, and passes a replica's answer on.

Ray routes HTTP requests without reading them; a call of another deployment it routes by the call's arguments. So bodies
are read here, and replicas are called with them: what a request says, in the replica, where the engine is.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.api_errors import INTERNAL, RETRY_SECONDS, SERVER, ApiError, ErrorAnswer
from serving.endpoints import ClientGoneError, error_response, until_gone
from serving.event_stream import event
from serving.ray.affinity import beginning_of
from serving.ray.forwarding import ForwardedRequest, forwarded
from serving.ray.merged_metrics import merged
from serving.request_limits import read_body, read_json

# Seconds in which a replica says something, its wait for room and the time until there is one included.
SILENT_SECONDS = 60.0
# Replicas that a request is given to, one after the other, while nothing of an answer was passed on.
_ATTEMPTS = 3
_log = logging.getLogger("quasar.serving")

LOST = ErrorAnswer(
    status=503,
    message="the replica that had this request is gone: ask again",
    type=SERVER,
    code="replica_lost",
    headers={"retry-after": str(RETRY_SECONDS), "x-should-retry": "true"},
)
SILENT = ErrorAnswer(
    status=503,
    message=f"no replica said anything for {SILENT_SECONDS:g} seconds: ask again",
    type=SERVER,
    code="replica_silent",
    headers={"retry-after": str(RETRY_SECONDS), "x-should-retry": "true"},
)


class MessageStream(Protocol):
    """A call of a replica that is under way."""

    def __aiter__(self) -> AsyncIterator[Message | None]: ...

    async def __anext__(self) -> Message | None: ...

    def cancel(self) -> None:
        """End it, in the replica, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """The replicas as the ingress sees them.

    Attributes:
        answer: give a request, with the name of its beginning, to one of them.
        expositions: the metrics of each.
        failure: the error answer that an exception of these two becomes; `LOST` where another replica may be asked.
    """

    answer: Callable[[ForwardedRequest, str], MessageStream]
    expositions: Callable[[], Awaitable[Sequence[bytes]]]
    failure: Callable[[Exception], ErrorAnswer]


class Relay:
    """The application.

    Args:
        replicas: who answers.
        max_body_bytes: of a request.
        prefix_cache: "salted", "shared" or "off", as the replicas have it.
    """

    def __init__(self, replicas: Replicas, *, max_body_bytes: int, prefix_cache: str) -> None:
        self._replicas, self._max_body_bytes, self._prefix_cache = replicas, max_body_bytes, prefix_cache

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        passing = _Passing(send)
        try:
            if scope["path"] == "/metrics" and scope["method"] == "GET":
                await _exposition(await self._replicas.expositions())(scope, receive, send)
                return
            body = await read_body(request, self._max_body_bytes)
            await until_gone(request, self._pass(forwarded(scope, body), self._beginning(request, body), passing))
        except (ClientGoneError, ClientDisconnect):
            return
        except Exception as error:
            answer = error.answer if isinstance(error, ApiError) else self._replicas.failure(error)
            if answer.status >= 500:
                known = answer is not INTERNAL
                _log.error("%s failed: %s", scope["path"][:100], error, exc_info=None if known else error)
            await passing.fail(answer, scope, receive)

    def _beginning(self, request: Request, body: bytes) -> str:
        if self._prefix_cache == "off" or request.method != "POST":
            return ""
        try:
            value = read_json(body)
        except ApiError:
            # The replica says so.
            return ""
        authorization = request.headers.get("authorization", "")
        return beginning_of(value, authorization, shared=self._prefix_cache == "shared")

    async def _pass(self, request: ForwardedRequest, beginning: str, passing: "_Passing") -> None:
        """Pass a replica's answer on; a replica that is lost before anything of it was is followed by another."""
        for attempt in range(1, _ATTEMPTS + 1):
            stream = self._replicas.answer(request, beginning)
            try:
                while True:
                    async with asyncio.timeout(SILENT_SECONDS):
                        message = await anext(stream)
                    if message is not None:
                        await passing.send(message)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise ApiError(SILENT) from None
            except Exception as error:
                if passing.complete:
                    return
                if passing.begun or attempt == _ATTEMPTS or self._replicas.failure(error) is not LOST:
                    raise
                _log.warning("a replica was lost, and another is asked: %s", error)
                passing.forget()
            finally:
                if not passing.complete:
                    stream.cancel()


class _Passing:
    """An answer on its way to the client; its head waits for the first of its body, and may still be another's."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self.begun = self.complete = False
        self._events = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            # Ray's proxy writes the request's name, which it has given to the replica, itself.
            headers = [one for one in message["headers"] if one[0] != b"x-request-id"]
            self._head = {**message, "headers": headers}
            return
        if self._head is not None and not self.begun:
            self.begun = True
            self._events = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in self._head["headers"]
            )
            await self._send(self._head)
        await self._send(message)
        self.complete = not message.get("more_body", False)

    def forget(self) -> None:
        """Take the answer of another replica."""
        self._head = None

    async def fail(self, answer: ErrorAnswer, scope: Scope, receive: Receive) -> None:
        """End with an error: as the answer, or as the last event of a stream that has begun."""
        if not self.begun:
            await error_response(answer)(scope, receive, self._send)
        elif self._events and not self.complete:
            await self._send({"type": "http.response.body", "body": event(answer.to_json()), "more_body": False})


def _exposition(texts: Sequence[bytes]) -> Response:
    return Response(merged(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _live(receive: Receive, send: Send) -> None:
    """ASGI's lifespan: nothing is to be started, or stopped."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
