"""What a server is told when it starts."""

from dataclasses import dataclass, field

from quasar.errors import QuasarError
from serving.keys import Keys
from serving.tools.call_formats import CALL_FORMATS

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of a server, checked; a value that cannot be is a `QuasarError`.

    Attributes:
        name: the model's name in the API; "" takes the engine's own.
        queue_limit: answers that may wait beside those that the slots hold.
        max_tokens_limit: new tokens that a request may ask for; None: any number.
        max_body_bytes: of a request.
        timeout: seconds that a request may take; None: any number.
        drain_seconds: how long requests go on after the server was told to stop.
        tool_format: how answers call functions, a name of `CALL_FORMATS`; "" takes what the chat template teaches.
        cors_origins: web pages of these origins may ask; none by default.
        page: there is a page at `/`.
        keys: who may ask.
    """

    name: str = ""
    queue_limit: int = 64
    max_tokens_limit: int | None = None
    max_body_bytes: int = 4 * 2**20
    timeout: float | None = None
    drain_seconds: float = 30.0
    tool_format: str = ""
    cors_origins: tuple[str, ...] = ()
    page: bool = True
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("queue_limit", self.queue_limit, 0),
            ("max_tokens_limit", self.max_tokens_limit, 1),
            ("max_body_bytes", self.max_body_bytes, 1),
            ("drain_seconds", self.drain_seconds, 0),
        ):
            # What is no number is not below the least one.
            if value is not None and not value >= least:
                raise QuasarError(f"{name} is {value}; {least} or more was expected")
        if self.timeout is not None and not self.timeout > 0:
            raise QuasarError(f"timeout is {self.timeout}; seconds, more than 0, were expected")
        if self.tool_format and self.tool_format not in CALL_FORMATS:
            raise QuasarError(f"tool_format is {self.tool_format!r}; one of {', '.join(CALL_FORMATS)} was expected")
        if not self.name.isprintable() or len(self.name) > 200:
            raise QuasarError(f"name is {self.name[:60]!r}; printable characters, 200 at most, were expected")
