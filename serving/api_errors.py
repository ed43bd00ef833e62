"""Errors as OpenAI writes them, and which one a runtime's error becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quasar.errors import ContextLimitError, FaultError, GenerationError, PromptError, QueueFullError

# Seconds after which a client may try again, where the queue is full or the server is stopping.
RETRY_SECONDS = 1
INVALID, RATE_LIMIT, SERVER = "invalid_request_error", "rate_limit_error", "server_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """The answer to a request that cannot be honoured.

    `param`: the field that is wrong, as a path like `messages[0].content`. `code`: OpenAI's, where it has one.
    """

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def for_log(self) -> str:
        """What a log may hold: the message of a field that is wrong quotes what was sent, and is left out."""
        if self.status == 400:
            return f"{self.param or 'the request'}: {self.code or self.type}"
        return self.message[:300]

    def to_json(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ApiError(Exception):
    """Ends a request with an error answer."""

    def __init__(self, answer: ErrorAnswer) -> None:
        super().__init__(answer.message)
        self.answer = answer


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A field that cannot be honoured: status 400."""
    return ApiError(ErrorAnswer(status=400, message=message, param=param, code=code))


def too_long(param: str, max_length: int, message: str) -> ApiError:
    """What was sent does not fit the context: status 400, in OpenAI's words, by which clients know it."""
    message = f"this model's maximum context length is {max_length} tokens: {message}"
    return invalid(param, message, "context_length_exceeded")


def too_busy(message: str) -> ApiError:
    """As many requests run and wait as may: status 429."""
    return ApiError(
        ErrorAnswer(
            status=429,
            message=message,
            type=RATE_LIMIT,
            code="rate_limit_exceeded",
            headers={"retry-after": str(RETRY_SECONDS)},
        )
    )


STOPPING = ErrorAnswer(
    status=503,
    message="the server is stopping: try again later, or elsewhere",
    type=SERVER,
    code="server_stopping",
    headers={"retry-after": str(RETRY_SECONDS)},
)
# Clients of OpenAI's repeat what fails with 5xx unless they are told not to; it would take as long again.
OUT_OF_TIME = ErrorAnswer(
    status=504,
    message="the answer was not complete when the server's time for a request was over: ask for fewer tokens",
    type="timeout_error",
    code="deadline_exceeded",
    headers={"x-should-retry": "false"},
)
INTERNAL = ErrorAnswer(status=500, message="the server failed; its log says how", type=SERVER, code="internal_error")


def answer_to(error: BaseException, fields: Mapping[str, str], prompt: str, max_length: int) -> ErrorAnswer:
    """The error answer that an exception becomes.

    Args:
        error: what was raised while a request was checked or answered.
        fields: option of the runtime → the field that it came from.
        prompt: the field that holds the prompt.
        max_length: tokens that a sequence may have.
    """
    if isinstance(error, ApiError):
        return error.answer
    if isinstance(error, ContextLimitError):
        return too_long(prompt, max_length, str(error)).answer
    if isinstance(error, QueueFullError):
        return too_busy(str(error)).answer
    if isinstance(error, PromptError) or (isinstance(error, GenerationError) and str(error).startswith("the prompt ")):
        return ErrorAnswer(status=400, message=str(error), param=prompt)
    if isinstance(error, GenerationError) and not isinstance(error, FaultError):
        # Messages of the runtime begin with the option's name.
        option, _, rest = str(error).partition(" ")
        name = fields.get(option)
        return ErrorAnswer(status=400, message=str(error) if name is None else f"{name} {rest}", param=name)
    return INTERNAL
