"""One HTTP/1.1 connection: uvicorn's over h11, which also drops peers that stall.

h11 and not httptools: it is strict about what a request is (of two lengths, or a length beside chunks, none is
guessed), counts the bytes of headers while they come, and is Python that no packet can make read out of bounds.
uvicorn asks httptools for a leniency. The parser's time does not show beside a pass of a model.
"""

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.api_errors import ErrorAnswer
from serving.request_limits import MOST_HEADER_BYTES

# Seconds in which a request must have arrived, and in which a client must have read something of what was sent to it.
REQUEST_SECONDS, STALL_SECONDS = 60.0, 60.0
# h11 gives up here; what is longer than MOST_HEADER_BYTES and comes at once is refused with the same status by the app.
MOST_INCOMPLETE_BYTES = 2 * MOST_HEADER_BYTES


class Connection(H11Protocol):
    """A connection whose peer must send its requests, and read its answers, in time."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is to come."""
        super().connection_made(transport)
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is to come."""
        self._arrival = _cancelled(self._arrival)
        self._stall = _cancelled(self._stall)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        """The next request may have begun."""
        super().on_response_complete()
        self._watch_arrival()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        self._stall = self._stall or self._watch_stall()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._stall = _cancelled(self._stall)

    def _watch_stall(self) -> asyncio.TimerHandle:
        """Look whether the client reads any of what waits for it."""
        return self.loop.call_later(STALL_SECONDS, self._look, self.transport.get_write_buffer_size())

    def _look(self, waiting: int) -> None:
        """Drop a client that has read nothing since `waiting` bytes waited for it."""
        self._stall = None
        if self.transport.get_write_buffer_size() < waiting:
            self._stall = self._watch_stall()
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """A request that is none, in the API's form, with the status that h11 has for it."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        answer = ErrorAnswer(status=status, message=msg if error is None else f"{msg} ({error})")
        body = json.dumps(answer.to_json()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for part in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def _watch_arrival(self) -> None:
        """Give a request that has begun, or the first one, its time; one that is whole needs none."""
        state = self.conn.their_state
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if state is h11.SEND_BODY or (state is h11.IDLE and begun):
            self._arrival = self._arrival or self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        else:
            self._arrival = _cancelled(self._arrival)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Nothing, in place of a timer."""
    if timer is not None:
        timer.cancel()
    return None
