"""A server process: the socket, the engine, uvicorn."""

import logging
import socket

import uvicorn
from prometheus_client import disable_created_metrics

from quasar.errors import QuasarError
from runtime import Engine
from serving.access_log import log_to_stderr
from serving.app import make_app
from serving.connection import MOST_INCOMPLETE_BYTES, Connection
from serving.endpoints import Service
from serving.lifecycle import DrainingServer
from serving.settings import LOOPBACK, ServerSettings

_log = logging.getLogger("quasar.serving")
# Seconds that cancelled requests have for their last words.
_LAST_WORDS = 2
# Seconds that a connection is kept for its next request: longer than proxies keep theirs, so that these close first.
_KEPT = 75
# Bytes that the system keeps for a client that does not read; left alone, it would keep megabytes for each.
_SEND_BUFFER = 131072


def bind(host: str, port: int) -> socket.socket:
    """A socket with the address, which does not listen yet: nobody is let wait for an engine that loads.

    Raises `QuasarError` for an address that cannot be had.
    """
    if not 0 <= port <= 65535:
        # The system would take the rest of a division.
        raise QuasarError(f"cannot listen at {host} port {port}: a port from 0 to 65535 was expected")
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections have what the socket has that they come from.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise QuasarError(f"cannot listen at {host} port {port} ({error}): choose another --host or --port") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def serve(engine: Engine, settings: ServerSettings, bound: socket.socket, *, host: str) -> None:
    """Answer requests until SIGTERM or SIGINT, and then until those that run have ended, or time is up."""
    log_to_stderr()
    # A second series for each counter, of when it was made, is of no use here.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    if host not in LOOPBACK and not settings.keys.asked_for:
        _log.warning("listening at %s without keys: whoever reaches this address may ask (--api-key-file)", host)
    service = Service(engine, settings)
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MOST_INCOMPLETE_BYTES,
        timeout_graceful_shutdown=_LAST_WORDS,
        timeout_keep_alive=_KEPT,
    )
    server = DrainingServer(config, service.lifecycle, f"{service.name} is served at {address_of(bound)}")
    server.run(sockets=[bound])
