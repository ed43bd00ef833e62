"""A name for each request, and a line of JSON on stderr when it has ended."""

import datetime as dt
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What a request's name may be made of; a client's own is taken as far as it is.
_OTHERS = re.compile(r"[^A-Za-z0-9._:/+=-]")
_LONGEST_ID = 128
_log = logging.getLogger("quasar.serving.access")


@dataclass(slots=True, kw_only=True)
class Record:
    """What the log says of a request; fields that stay None are left out."""

    request_id: str
    client: str
    method: str
    path: str
    status: int = 0
    seconds: float = 0.0
    stream: bool | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_seconds: float | None = None
    acceptance_length: float | None = None
    finish_reasons: list[str] | None = None
    user: str | None = None
    error: str | None = None
    begun: float = field(default_factory=time.perf_counter)


def record_of(request: Request) -> Record:
    """The record of a request that came through `AccessLog`."""
    record: Record = request.scope["state"]["record"]
    return record


class AccessLog:
    """ASGI middleware: names requests, adds `x-request-id` to answers, and writes the log.

    Args:
        app: what answers.
        ended: called with each record.
    """

    def __init__(self, app: ASGIApp, ended: Callable[[Record], None]) -> None:
        self._app, self._ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(
            request_id=request_id(Headers(scope=scope).get("x-request-id", "")),
            client=(scope.get("client") or ("",))[0],
            method=scope["method"],
            path=scope["path"][:200],
        )
        scope.setdefault("state", {})["record"] = record

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            record.seconds = round(time.perf_counter() - record.begun, 6)
            self._ended(record)
            _log.info("%s", record.path, extra={"fields": _told(record)})


def request_id(given: str) -> str:
    """A client's own name for a request without what may not stand in a header or a log; else a new one."""
    return _OTHERS.sub("", given[:_LONGEST_ID]) or secrets.token_hex(16)


def _told(record: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None and name != "begun"}


class JsonLines(logging.Formatter):
    """A record as one line of JSON; `extra={"fields": …}` takes the message's place."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line.update({"message": record.getMessage()} if fields is None else fields)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Write what this package and uvicorn log to stderr, as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("quasar", logging.WARNING), ("uvicorn.error", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    _log.setLevel(logging.INFO)
