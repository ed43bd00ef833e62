"""Server processes on loopback, and plain HTTP to them."""

import contextlib
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
# Seconds after which something is broken, and not slow: a server starts in two, on an idle machine.
PATIENCE = 60


@dataclass(kw_only=True)
class RunningServer:
    """A server process that is ready, and where it writes."""

    process: subprocess.Popen
    url: str
    name: str
    log: Path

    @property
    def address(self):
        return urlsplit(self.url).hostname, urlsplit(self.url).port

    def request(self, method, path, body=None, headers=(), *, raw=None):
        """(status, JSON or text, headers)."""
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        sent = {"content-type": "application/json", **dict(headers)}
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request(method, path, body=data, headers=sent)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        kind = response.getheader("content-type", "")
        value = json.loads(text) if kind.startswith("application/json") else text.decode()
        return response.status, value, {name.lower(): value for name, value in response.getheaders()}

    def post(self, path, body, headers=()):
        return self.request("POST", path, body, headers)

    def chat(self, **fields):
        """(status, JSON) of a chat with one short message."""
        body = {"model": self.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}
        return self.post("/v1/chat/completions", body)[:2]

    def completion(self, **fields):
        return self.post("/v1/completions", {"model": self.name, "prompt": "hi", "max_tokens": 4, **fields})[:2]

    def metrics(self):
        """(name, labels without the model's) → value."""
        found = {}
        for family in text_string_to_metric_families(self.request("GET", "/metrics")[1]):
            for sample in family.samples:
                labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
                found[(sample.name, *sorted(labels.items()))] = sample.value
        return found

    def metric(self, name, **labels):
        return self.metrics().get((name, *sorted(labels.items())), 0.0)

    def under_way(self):
        """Answers that run or wait."""
        found = self.metrics()
        return found[("vllm:num_requests_running",)] + found[("vllm:num_requests_waiting",)]

    def lines(self):
        """What the server has logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stalled_stream(self, **fields):
        """A socket whose client asked for more than it reads: it has read that the answer begins."""
        body = {"model": self.name, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        # With logprobs an answer is longer than what sockets hold.
        body |= {"max_tokens": 480, "ignore_eos": True, "logprobs": True, "top_logprobs": 20, **fields}
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect(self.address)
        client.sendall(http_request("/v1/chat/completions", json.dumps(body).encode()))
        assert client.recv(12) == b"HTTP/1.1 200"
        return client

    def send(self, data):
        """Everything that comes back for raw bytes, until the server closes or says nothing for a second."""
        with socket.create_connection(self.address, timeout=PATIENCE) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
            received = b""
            while select.select([client], [], [], 1.0)[0]:
                try:
                    part = client.recv(65536)
                except ConnectionError:
                    break
                if not part:
                    break
                received += part
            return received


def http_request(path, body, *headers):
    """Bytes of a POST request."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def until(condition, what):
    """Wait for something that comes soon."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@contextlib.contextmanager
def running(engine, folder, *options):
    """A server of an engine directory; it is killed at the end, if it still runs."""
    log, out = folder / "log", folder / "out"
    arguments = [sys.executable, "-m", "serving", "serve", str(engine), "--port", "0", *map(str, options)]
    with log.open("w") as errors, out.open("w") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=errors,
            cwd=ROOT,
            env={**os.environ, "QUASAR_CACHE": str(folder), "PYTHONUNBUFFERED": "1"},
        )
    try:
        until(lambda: out.read_text().endswith("\n") or process.poll() is not None, "the server did not start")
        assert process.poll() is None, log.read_text()
        name, _, url = out.read_text().strip().partition(" is served at ")
        yield RunningServer(process=process, url=url, name=name, log=log)
    finally:
        process.kill()
        process.wait()
