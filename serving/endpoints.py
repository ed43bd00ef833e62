"""From a request that came over HTTP to the engine, and back: one engine's API."""

import asyncio
import functools
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from quasar import __version__
from runtime import Engine, Event
from runtime.asynchronous import ThreadedStreams
from serving.access_log import Record, record_of
from serving.api_errors import OUT_OF_TIME, STOPPING, ApiError, ErrorAnswer, answer_to
from serving.api_request import ApiRequest, ServedModel, no_such_model
from serving.chat_request import CHAT_FIELDS, read_chat_request
from serving.completion_request import COMPLETION_FIELDS, read_completion_request
from serving.event_stream import DONE, QUIET_SECONDS, STILL_HERE, EventStream, event, wait_until_gone
from serving.lifecycle import Lifecycle
from serving.prometheus import AnswerClock, ServerMetrics
from serving.request_limits import Admission, read_body, read_json
from serving.responses import Choice, Chunks, Heading, whole_answer
from serving.sampling_fields import options_to_fields
from serving.settings import ServerSettings
from serving.tools.call_support import calls_of

_Value = TypeVar("_Value")
_log = logging.getLogger("quasar.serving")
# The client has gone; nobody reads the answer. nginx has this status for its log.
_GONE = 499
_OPTION_FIELDS = {True: options_to_fields(CHAT_FIELDS), False: options_to_fields(COMPLETION_FIELDS)}


class ClientGoneError(Exception):
    """The client closed the connection before there was an answer."""


class Service:
    """Answers requests with an engine.

    Args:
        engine: loaded; its own `queue_limit` is the server's to keep, so it should have none.
        replica: the engine's name among several, a label of its metrics.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, *, replica: str = "0") -> None:
        self.engine, self.settings = engine, settings
        self.name = settings.name or str(engine.manifest.model["name"])
        self.lifecycle = Lifecycle(settings.drain_seconds)
        self.metrics = ServerMetrics(engine, self.name, replica)
        self._admission = Admission(most=engine.metrics().slots + settings.queue_limit)
        self._created = int(time.time())
        template = engine.codec.chat_template
        calls, no_calls = calls_of(engine.codec, settings.tool_format)
        self._model = ServedModel(
            name=self.name,
            # OpenAI's default, unless the checkpoint has one.
            defaults={"temperature": 1.0, **engine.manifest.sampling_defaults},
            template="" if template is None else template.default_source,
            max_length=engine.manifest.contract.max_length,
            token_limit=settings.max_tokens_limit,
            calls=calls,
            no_calls=no_calls,
        )

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answered(request, functools.partial(read_chat_request, model=self._model), chat=True)

    async def completion(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._answered(request, functools.partial(read_completion_request, model=self._model), chat=False)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self.check_key(request)
        return json_response({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        self.check_key(request)
        if request.path_params["id"] != self._model.name:
            raise no_such_model(request.path_params["id"], self._model.name)
        return json_response(self._model_object())

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - an endpoint's
        """`GET /health`: the process answers."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002 - an endpoint's
        """`GET /ready`: requests are taken."""
        self.lifecycle.check_open()
        return json_response({"status": "ready"})

    async def version(self, request: Request) -> Response:  # noqa: ARG002 - an endpoint's
        """`GET /version`."""
        manifest = self.engine.manifest
        return json_response({"version": __version__, "engine": manifest.engine_hash, "backend": self.engine.backend})

    async def exposition(self, request: Request) -> Response:  # noqa: ARG002 - an endpoint's
        """`GET /metrics`."""
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def check_key(self, request: Request) -> str:
        """Who asks; raises `ApiError` for nobody that may."""
        return self.settings.keys.holder(request.headers.get("authorization"))

    async def _answered(self, request: Request, read: Callable[..., ApiRequest], *, chat: bool) -> Response:
        record = record_of(request)
        asked: ApiRequest | None = None
        try:
            key = self.check_key(request)
            self.lifecycle.check_open()
            _check_media_type(request)
            body = await read_body(request, self.settings.max_body_bytes)
            asked = read(read_json(body), key=key)
            return await self._answer(request, asked, record)
        except (ClientGoneError, ClientDisconnect):
            record.status, record.error = _GONE, "the client is gone"
            return Response(status_code=_GONE)
        except Exception as error:
            return error_response(self.error_answer(error, record, chat=chat, asked=asked))

    def error_answer(
        self, error: Exception, record: Record, *, chat: bool, asked: ApiRequest | None = None
    ) -> ErrorAnswer:
        """What a client is told of an exception; the log is told, too. `asked`: the request, if it could be read."""
        fields = _OPTION_FIELDS[chat] if asked is None else {**_OPTION_FIELDS[chat], **asked.option_fields}
        answer = answer_to(error, fields, "messages" if chat else "prompt", self._model.max_length)
        if self.lifecycle.stopping and answer.status != 503 and not isinstance(error, ApiError):
            # The engine may have been closed already.
            answer = STOPPING
        if answer.status == 500:
            _log.error("request %s failed", record.request_id, exc_info=error)
        record.error = answer.for_log()
        return answer

    async def _answer(self, request: Request, asked: ApiRequest, record: Record) -> Response:
        record.stream, record.user = asked.stream, asked.user or None
        self._admission.take(asked.choices)
        running = _Running(self, asked, record)
        try:
            if not asked.stream:
                response = await until_gone(request, running.whole())
                running.end()
                return response
            await until_gone(request, running.begin())
            return EventStream(running.chunks(), running.end)
        except BaseException:
            running.end()
            raise

    def streams(self, asked: ApiRequest, cancel: threading.Event) -> ThreadedStreams:
        """The answers of a request that was let in."""
        starts = [functools.partial(self._start, asked, index, cancel) for index in range(asked.choices)]
        return ThreadedStreams(starts, cancel, self._admission.leave)

    def _start(self, asked: ApiRequest, index: int, cancel: threading.Event) -> Iterator[Event]:
        """An answer's stream; in its own thread, since it tokenizes the prompt."""
        options = asked.options_of(index)
        return self.engine.stream(asked.prompt_of(index), **options, cancel=cancel, deadline=self.settings.timeout)

    async def heading_for(self, asked: ApiRequest) -> Heading:
        """What is on top of an answer's objects."""
        ids: list[list[int]] = []
        if asked.return_token_ids:
            names = ("chat_template", "tools", "chat_template_kwargs", "continue_final_message")
            options: Any = {name: asked.options[name] for name in names if name in asked.options}
            encoded = [await asyncio.to_thread(self.engine.encode, one, **options) for one in asked.prompts]
            ids = [one.tolist() for one in encoded]
        return Heading(
            id=f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(16)}",
            created=int(time.time()),
            model=self._model.name,
            fingerprint=f"quasar-{self.engine.manifest.engine_hash[:12]}",
            prompt_ids=ids,
        )

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "quasar",
            "max_model_len": self._model.max_length,
            "drafters": self.engine.drafters,
        }


class _Running:
    """A request that is being answered."""

    def __init__(self, service: Service, asked: ApiRequest, record: Record) -> None:
        self._service, self._asked, self._record = service, asked, record
        self._cancel = threading.Event()
        # Every prompt was read, and every option can be honoured.
        self._begun = False
        keeps_rounds = asked.return_rounds and not asked.stream
        self._choices = [Choice(index=index, rounds=[] if keeps_rounds else None) for index in range(asked.choices)]
        self._clocks = [service.metrics.clock(record.begun) for _ in range(asked.choices)]
        self._streams = service.streams(asked, self._cancel)
        service.lifecycle.begin(self._cancel)

    def end(self) -> None:
        """No more is to come, or to be read: what still generates ends within a round."""
        self._cancel.set()
        self._service.lifecycle.end(self._cancel)
        for clock in self._clocks if self._begun else ():
            clock.leave()
        self._note()

    async def begin(self) -> None:
        """Start to generate; raises what cannot be honoured."""
        self._streams.start()
        await self._streams.begun()
        self._begun = True

    async def whole(self) -> Response:
        """Everything in one object."""
        await self.begin()
        async for index, one in self._streams.events():
            if one is not None:
                self._take(index, one)
        heading = await self._service.heading_for(self._asked)
        codec = self._service.engine.codec
        # Megabytes, with the likeliest tokens of thousands: streams go on meanwhile.
        return await asyncio.to_thread(lambda: json_response(whole_answer(heading, self._asked, self._choices, codec)))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Events of a stream, the last of which may be an error."""
        service = self._service
        try:
            chunks = Chunks(await service.heading_for(self._asked), self._asked, service.engine.codec)
            for value in chunks.first():
                yield event(value)
            async for index, one in self._streams.events(QUIET_SECONDS):
                if one is None:
                    yield STILL_HERE
                    continue
                self._take(index, one)
                for value in chunks.of(index, one):
                    yield event(value)
            for value in chunks.last(self._choices):
                yield event(value)
            yield DONE
        except Exception as error:
            yield event(service.error_answer(error, self._record, chat=self._asked.chat, asked=self._asked).to_json())

    def _take(self, index: int, one: Event) -> None:
        """An event; raises `ApiError` for one that ends an answer before it is complete."""
        self._clocks[index].step(one)
        if one.finish_reason == "deadline":
            raise ApiError(OUT_OF_TIME)
        if one.finish_reason == "cancelled":
            raise ApiError(STOPPING)
        self._choices[index].add(one)

    def _note(self) -> None:
        """What the log says."""
        record, stats = self._record, [one.stats for one in self._choices if one.stats is not None]
        if self._begun:
            record.first_token_seconds = _first(self._clocks)
            record.completion_tokens = sum(len(one.token_ids) for one in self._choices)
        if stats:
            prompts = stats[:: self._asked.n]
            record.prompt_tokens = sum(one.prompt_tokens for one in prompts)
            record.cached_tokens = sum(one.reused_tokens for one in prompts)
            record.finish_reasons = [one.finish_reason for one in stats]
            rounds = sum(one.rounds for one in stats)
            if rounds:
                record.acceptance_length = round(sum(one.tokens - 1 for one in stats if one.rounds) / rounds, 3)


def json_response(value: Any, status: int = 200, headers: Any = None) -> Response:
    """A JSON object; as ASCII, so that any text a client sent can be repeated."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def error_response(answer: ErrorAnswer) -> Response:
    """An error answer."""
    return json_response(answer.to_json(), answer.status, dict(answer.headers))


async def until_gone(request: Request, work: Awaitable[_Value]) -> _Value:
    """The work's result; raises `ClientGoneError` if the client closes the connection before it is there."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_until_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _check_media_type(request: Request) -> None:
    """JSON alone: what a web page may send without asking first is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(ErrorAnswer(status=415, message=f"content-type is {kind[:60]!r}; application/json was expected"))


def _first(clocks: list[AnswerClock]) -> float | None:
    seconds = [one.first_token_seconds for one in clocks if one.first_token_seconds is not None]
    return round(min(seconds), 6) if seconds else None
