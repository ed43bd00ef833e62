"""The server's life: it is ready, or it is stopping and lets what runs come to its end, for a while."""

import signal
import threading
import time
from types import FrameType

import uvicorn

from serving.api_errors import STOPPING, ApiError


class Lifecycle:
    """Whether requests are taken, and what runs.

    Args:
        drain_seconds: how long requests may go on after the server was told to stop.
    """

    def __init__(self, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds
        self._stops_at: float | None = None
        self._running: set[threading.Event] = set()

    @property
    def stopping(self) -> bool:
        """Whether the server was told to stop."""
        return self._stops_at is not None

    @property
    def may_end(self) -> bool:
        """Whether nothing runs any more, or time is up."""
        return self._stops_at is not None and (not self._running or time.monotonic() >= self._stops_at)

    def check_open(self) -> None:
        """Raise `ApiError` (503) where no request is taken any more."""
        if self.stopping:
            raise ApiError(STOPPING)

    def begin(self, cancel: threading.Event) -> None:
        """A request runs; `cancel` ends it."""
        self._running.add(cancel)

    def end(self, cancel: threading.Event) -> None:
        """It does no more."""
        self._running.discard(cancel)

    def stop(self) -> None:
        """Take no more requests. A second time: wait for none."""
        self._stops_at = time.monotonic() + (0 if self.stopping else self._drain_seconds)

    def cancel_all(self) -> None:
        """End what still runs."""
        for cancel in tuple(self._running):
            cancel.set()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which goes on answering while it drains: those who ask are told, and not cut off."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, ready: str) -> None:
        """`ready`: the line that is printed when requests are taken."""
        super().__init__(config)
        self._lifecycle, self._ready = lifecycle, ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """SIGTERM and SIGINT: drain; a second one stops at once."""
        assert sig in (signal.SIGTERM, signal.SIGINT)
        self._lifecycle.stop()

    async def startup(self, sockets: object = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets=sockets)  # type: ignore[arg-type]
        print(self._ready, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self._lifecycle.may_end:
            self._lifecycle.cancel_all()
            return True
        return await super().on_tick(counter)
