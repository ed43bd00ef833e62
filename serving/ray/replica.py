"""A replica: an engine, and the server's application over it."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import disable_created_metrics
from starlette.types import Message

import runtime
from quasar.errors import EngineError
from runtime.scheduler import FIRST_OF_ALL
from serving.access_log import log_to_stderr
from serving.app import make_app
from serving.endpoints import Service
from serving.keys import read_keys
from serving.ray.forwarding import ForwardedRequest, answered
from serving.settings import ServerSettings

# Seconds in which a healthy engine gives one token to a request that goes before all others.
HEALTHY_SECONDS = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a replica loads its engine; paths are those of its own machine.

    `api_key_file`: read by each replica, so that keys do not travel. `revision`: differs where replicas are to be
    replaced though nothing else does.
    """

    directory: str
    slots: int
    threads: int
    backend: str | None = None
    kernels: str | None = None
    prefix_cache: str = "salted"
    api_key_file: str | None = None
    revision: str = ""


class EngineReplica:
    """What Ray makes in each replica's process.

    Args:
        name: of the replica, for its metrics.
    """

    def __init__(self, loading: EngineSettings, settings: ServerSettings) -> None:
        from ray import serve  # an extra

        log_to_stderr()
        disable_created_metrics()  # type: ignore[no-untyped-call]
        if loading.api_key_file is not None:
            settings = dataclasses.replace(settings, keys=read_keys(Path(loading.api_key_file)))
        self._engine = runtime.load(
            loading.directory,
            backend=loading.backend,
            kernels=loading.kernels,
            threads=loading.threads,
            max_sequences=loading.slots,
            # It is checked there.
            prefix_cache=loading.prefix_cache,  # type: ignore[arg-type]
        )
        self._engine.warmup()
        replica = serve.get_replica_context().replica_id.unique_id
        self._service = Service(self._engine, settings, replica=replica)
        self._app = make_app(self._service)

    async def answer(self, request: ForwardedRequest, beginning: str) -> AsyncGenerator[Message | None, None]:  # noqa: ARG002 - the router's
        """ASGI's messages of the answer; None now and then where nothing else is to be said."""
        messages = answered(self._app, request)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    async def exposition(self) -> bytes:
        """This replica's metrics."""
        return self._service.metrics.exposition()

    async def check_health(self) -> None:
        """Raise `EngineError` unless the engine gives a token, in bounded time; Ray replaces a replica that raises."""
        await asyncio.to_thread(self._one_token)

    def _one_token(self) -> None:
        answer = self._engine.generate(
            [0], max_new_tokens=1, chat_template=False, priority=FIRST_OF_ALL, deadline=HEALTHY_SECONDS, temperature=0
        )
        if not answer.token_ids:
            raise EngineError(f"the engine gave no token in {HEALTHY_SECONDS:g} seconds: its replica is replaced")

    def __del__(self) -> None:
        """Ray calls this when requests were let come to their end."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()
