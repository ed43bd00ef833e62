"""Routes, and what every request passes: its name, its headers' size, CORS, errors in one form."""

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.access_log import AccessLog, Record, record_of
from serving.api_errors import INTERNAL, ApiError, ErrorAnswer
from serving.chat_page import ChatPage
from serving.endpoints import Service, error_response
from serving.request_limits import MOST_HEADER_BYTES


def make_app(service: Service) -> ASGIApp:
    """The ASGI application."""
    origins = service.settings.cors_origins
    middleware = [Middleware(HeaderLimit)]
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=("GET", "POST"),
                # OpenAI's own client sends a dozen of its own (x-stainless-…).
                allow_headers=("*",),
                expose_headers=("x-request-id", "retry-after"),
            )
        )
    app = Starlette(
        routes=[
            *([Route("/", ChatPage().answer, methods=["GET"])] if service.settings.page else []),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.completion, methods=["POST"]),
            Route("/v1/models", service.models, methods=["GET"]),
            Route("/v1/models/{id:path}", service.model, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
            Route("/ready", service.ready, methods=["GET"]),
            Route("/metrics", service.exposition, methods=["GET"]),
            Route("/version", service.version, methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _failure},
    )

    def ended(record: Record) -> None:
        service.metrics.answered(record.path, record.status)

    return AccessLog(app, ended)


class HeaderLimit:
    """ASGI middleware: headers that are too long get status 431."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = self._app
        if scope["type"] == "http":
            size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
            size += sum(len(name) + len(value) for name, value in scope["headers"])
            if size > MOST_HEADER_BYTES:
                app = error_response(
                    ErrorAnswer(status=431, message=f"the headers are longer than {MOST_HEADER_BYTES} bytes")
                )
        await app(scope, receive, send)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record_of(request).error = error.answer.for_log()
    return error_response(error.answer)


async def _http_error(request: Request, error: Exception) -> Response:
    """What starlette refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    code = "unknown_url" if error.status_code == 404 else None
    return error_response(
        ErrorAnswer(status=error.status_code, message=message, code=code, headers=error.headers or {})
    )


async def _failure(request: Request, error: Exception) -> Response:  # noqa: ARG001 - a handler's
    """What nobody expected; starlette raises it again, and uvicorn writes it down."""
    return error_response(INTERNAL)
