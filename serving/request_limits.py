"""How much a client may send, and how many answers are under way at once."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import Request

from serving.api_errors import ApiError, ErrorAnswer, invalid, too_busy

# Bytes of a request's line and headers; what is longer gets status 431.
MOST_HEADER_BYTES = 16384
# Levels of a body's JSON: schemas of tools have a dozen.
_DEEPEST = 100


@dataclass(slots=True)
class Admission:
    """Counts answers that run or wait; more than `most` are refused, so that nothing grows with what is asked.

    The answers of one request are let in together or not at all.
    """

    most: int
    under_way: int = 0

    def take(self, count: int) -> None:
        """Let a request's answers in; raises `ApiError` (429) where there is no room for them now."""
        if count > self.most:
            raise invalid("n", f"the request asks for {count} answers at once; this server has room for {self.most}")
        if self.under_way + count > self.most:
            raise too_busy(
                f"{self.under_way} answers are under way or wait and the server has room for {self.most}: "
                "try again later"
            )
        self.under_way += count

    def leave(self) -> None:
        """One of them has ended."""
        self.under_way -= 1


async def read_body(request: Request, most: int) -> bytes:
    """The body; raises `ApiError` (413) as soon as it is known to be longer than `most` bytes."""
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > most:
        _refuse_size(most)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            _refuse_size(most)
        parts.append(part)
    return b"".join(parts)


def read_json(body: bytes) -> Any:
    """The JSON value of a body; raises `ApiError` (400) for what is none: no UTF-8, NaN, endless depth."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        # UnicodeDecodeError, JSONDecodeError, and integers that are too long.
        raise invalid(None, f"the body is not JSON ({error})") from None
    if is_too_deep(value):
        raise _too_deep()
    return value


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value has more levels than what walks through it, and calls itself at each, may meet."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> ApiError:
    return invalid(None, "the body is nested too deeply")


def _refuse_constant(name: str) -> NoReturn:
    raise invalid(None, f"the body holds {name}, which is no JSON number")


def _refuse_size(most: int) -> NoReturn:
    raise ApiError(ErrorAnswer(status=413, message=f"the body is longer than {most} bytes", code="request_too_large"))
