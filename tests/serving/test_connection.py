"""Peers that stall: in the middle of a request, or in front of an answer."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from serving import connection
from serving.connection import Connection
from tests.serving.servers import PATIENCE, until

SECONDS = 0.3
# Bytes of an answer that a client takes for longer than that to read.
WHOLE = 3_000_000


class Served:
    """uvicorn in a thread, with an app that answers without an end."""

    def __init__(self):
        self.gone = threading.Event()
        options = {"ws": "none", "lifespan": "off", "log_config": None, "loop": "asyncio", "interface": "asgi3"}
        config = uvicorn.Config(self.app, http=Connection, **options)
        self.server = uvicorn.Server(config)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        self.socket.bind(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    async def app(self, scope, receive, send):
        message = await receive()
        while message["type"] != "http.disconnect" and message.get("more_body"):
            message = await receive()
        if message["type"] == "http.disconnect":
            self.gone.set()
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/short":
            await send({"type": "http.response.body", "body": b"ok"})
            return
        if scope["path"] == "/whole":
            await send({"type": "http.response.body", "body": b"x" * WHOLE})
            return
        watching = asyncio.ensure_future(receive())
        while not watching.done():
            await send({"type": "http.response.body", "body": b"x" * 10000, "more_body": True})
            await asyncio.sleep(0)
        self.gone.set()

    def connect(self):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect(self.socket.getsockname())
        return client


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(connection, "REQUEST_SECONDS", SECONDS)
    monkeypatch.setattr(connection, "STALL_SECONDS", SECONDS)
    made = Served()
    made.thread.start()
    try:
        until(lambda: made.server.started, "it did not start")
        yield made
    finally:
        made.server.should_exit = made.server.force_exit = True
        made.thread.join()
        made.socket.close()


def is_closed(client):
    """Wait for the end of a connection."""
    with contextlib.suppress(ConnectionError):
        while client.recv(65536):
            continue
    return True


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /short HTTP/1.1\r\nho", b"POST /short HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc"],
    ids=["nothing", "half a header", "half a body"],
)
def test_a_request_that_does_not_come(served, sent):
    with served.connect() as client:
        client.sendall(sent)
        assert is_closed(client)


def test_a_request_that_comes_byte_by_byte(served):
    with served.connect() as client, contextlib.suppress(ConnectionError):
        end = time.monotonic() + PATIENCE
        for byte in b"GET /short HTTP/1.1\r\nx: " + b"y" * 10_000:
            client.sendall(bytes([byte]))
            time.sleep(0.01)
            assert time.monotonic() < end, "it may go on for ever"


def test_an_answer_that_nobody_reads(served):
    with served.connect() as client:
        client.sendall(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
        assert served.gone.wait(PATIENCE)
        assert is_closed(client)


def test_who_reads_slowly_is_no_staller(served):
    with served.connect() as client:
        client.sendall(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
        read, end = 0, time.monotonic() + 3 * SECONDS
        while time.monotonic() < end:
            read += len(client.recv(65536))
            time.sleep(0.01)
        assert read > 0
        assert not served.gone.is_set()
        client.recv(1)


def test_a_long_answer_is_read_to_its_end(served):
    """The transport is given all of it at once, and says nothing until most of it is sent."""
    with served.connect() as client:
        client.sendall(b"GET /whole HTTP/1.1\r\nhost: x\r\n\r\n")
        read, begun = 0, time.monotonic()
        while read < WHOLE:
            part = client.recv(16384)
            assert part, f"cut off after {read} bytes"
            read += len(part)
            time.sleep(0.01)
        assert time.monotonic() - begun > 2 * SECONDS


def test_connections_that_are_kept(served):
    """A request that was answered in time owes nothing: the next one has its own time."""
    request = b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n"
    with served.connect() as client:
        for _ in range(3):
            client.sendall(request)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                part = client.recv(65536)
                assert part, "the connection was closed"
                received += part
            time.sleep(1.5 * SECONDS)
