"""The server under load: Poisson arrivals, clients that leave, answers against the engine's own, memory, a restart.

    python benchmarks/server_load.py build/smollm2-w8a8 --prompts FILE.jsonl
    python benchmarks/server_load.py build/smollm2-w8a8 --prompts FILE.jsonl --minutes 30

It starts the server itself, on loopback, and kills it at the end to time a start. Requests are streamed chats, greedy
and drawn ones alternating; one in ten clients leaves after its first pieces. With `--minutes` requests go on for so
long, and memory is the server's own (RssAnon) after each tenth of the time; before that every slot has held the longest
prompt, since pages of the cache that were never written take no memory. The last line is JSON; a check that fails
ends with exit code 1.
"""

import argparse
import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

from service import resident_bytes

import runtime
from quasar.text import Message
from quasar.text.prompts import read_prompts

NAME = "engine"
# Of ten clients one leaves, after so many pieces.
LEAVING, LEAVES_AFTER = 0.1, 3
Messages = list[Message]
_MEGABYTE = 1 << 20
# The server is ready again within so many seconds after it was killed.
MOST_START = 3.0
# What its memory may grow by over a long run, and tokens of the answers that fill its slots before.
MOST_GROWTH = 0.05
_FILLING_TOKENS = 512


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a client saw of its request: seconds until its first piece, seconds between pieces, token ids."""

    number: int
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    left: bool = False
    error: str = ""


class Server:
    """A server process; `start_seconds`: from its start until it was ready."""

    def __init__(self, engine: Path, slots: int) -> None:
        start = time.perf_counter()
        command = [sys.executable, "-m", "serving", "serve", str(engine), "--port", "0", "--name", NAME]
        command += ["--slots", str(slots), "--queue-limit", "1000"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        self.url = line.split()[-1]
        self.start_seconds = time.perf_counter() - start

    def own_bytes(self) -> int:
        """Memory of its own."""
        return resident_bytes("RssAnon", self._process.pid)

    def kill(self) -> None:
        """End it at once."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def body_of(messages: Messages | None, number: int, tokens: int) -> dict[str, Any]:
    """A request: every second one is drawn."""
    sampling = {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0}
    return {
        "model": NAME,
        "messages": messages,
        "max_tokens": tokens,
        "stream": True,
        "return_token_ids": True,
        "top_p": 1,
        "repetition_penalty": 1,
        "top_k": 0,
        "min_p": 0,
        **sampling,
    }


def ask(url: str, body: dict[str, Any], seen: Seen, *, leaves: bool) -> None:
    """Stream an answer; a client that leaves closes its connection after three pieces."""
    start = last = time.perf_counter()
    pieces = 0
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != HTTPStatus.OK:
            seen.error = f"status {response.status}: {response.read(200)!r}"
            return
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                seen.error = str(chunk["error"])
                return
            ids = [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
            if not ids:
                continue
            now = time.perf_counter()
            if not seen.token_ids:
                seen.first = now - start
            else:
                seen.gaps.append(now - last)
            last = now
            seen.token_ids += ids
            pieces += 1
            if leaves and pieces == LEAVES_AFTER:
                seen.left = True
                return
    except (OSError, http.client.HTTPException) as error:
        seen.error = repr(error)
    finally:
        connection.close()


def load(url: str, prompts: list[Messages], options: argparse.Namespace, memory: Callable[[int], None]) -> list[Seen]:
    """All requests, as they arrive."""
    randomly = random.Random(7)
    room = threading.Semaphore(options.concurrent)
    found: list[Seen] = []
    threads: list[threading.Thread] = []
    began = time.perf_counter()
    seconds = 60 * options.minutes
    looks = 0

    def run(seen: Seen, *, leaves: bool) -> None:
        with room:
            body = body_of(prompts[seen.number % len(prompts)], seen.number, options.tokens)
            ask(url, body, seen, leaves=leaves)

    while len(found) < options.requests or time.perf_counter() - began < seconds:
        time.sleep(randomly.expovariate(options.rate))
        seen = Seen(number=len(found))
        found.append(seen)
        threads = [thread for thread in threads if thread.is_alive()]
        threads.append(threading.Thread(target=run, args=(seen,), kwargs={"leaves": randomly.random() < LEAVING}))
        threads[-1].start()
        if seconds and time.perf_counter() - began > looks * seconds / 10:
            memory(len(found))
            looks += 1
    for thread in threads:
        thread.join()
    return found


def fill_slots(url: str, prompts: list[Messages], count: int) -> None:
    """So many requests at once with the longest prompt; the first has not ended when the last one begins."""
    longest = max(prompts, key=lambda messages: sum(len(str(message["content"])) for message in messages))
    threads = [
        threading.Thread(
            target=ask,
            args=(url, {**body_of(longest, number, _FILLING_TOKENS), "ignore_eos": True}, Seen(number=number)),
            kwargs={"leaves": False},
        )
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    """Run the load; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2.0, help="requests that arrive in a second")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for so long, and look at memory")
    options = parser.parse_args()
    prompts = [list(row.messages) for row in read_prompts(options.prompts)]
    server = Server(options.engine, options.concurrent)
    own: list[tuple[int, int]] = []

    def memory(requests: int) -> None:
        own.append((requests, server.own_bytes()))
        print(f"{requests} requests: {own[-1][1] / _MEGABYTE:.1f} MB", flush=True)

    if options.minutes:
        fill_slots(server.url, prompts, options.concurrent)
    began = time.perf_counter()
    found = load(server.url, prompts, options, memory)
    seconds = time.perf_counter() - began
    memory(len(found))
    server.kill()
    again = Server(options.engine, options.concurrent)
    again.kill()

    whole = [seen for seen in found if not seen.left and not seen.error]
    first, gaps = [seen.first for seen in whole], [gap for seen in whole for gap in seen.gaps]
    errors = [seen.error for seen in found if seen.error]
    checked = whole[: options.requests]
    identical = 0
    with runtime.load(options.engine, max_sequences=options.concurrent) as engine:
        for seen in checked:
            body = body_of(None, seen.number, options.tokens)
            alone = engine.generate(
                prompts[seen.number % len(prompts)],
                max_new_tokens=options.tokens,
                temperature=body["temperature"],
                seed=body.get("seed"),
            )
            identical += list(alone.token_ids) == seen.token_ids

    def p95(values: list[float]) -> float:
        return 1e3 * quantiles(values, n=100, method="inclusive")[94]

    tokens = sum(len(seen.token_ids) for seen in found)
    print(
        f"{len(found)} requests in {seconds:.0f} s, {options.concurrent} at once at most, "
        f"{len(found) - len(whole) - len(errors)} left, {len(errors)} failed: first token p95 {p95(first):.0f} ms, "
        f"between pieces p95 {p95(gaps):.0f} ms, {tokens / seconds:.0f} tokens/s; "
        f"{identical} of {len(checked)} identical to the engine's; started in "
        f"{server.start_seconds:.1f} s, after kill -9 in {again.start_seconds:.1f} s"
    )
    print(
        json.dumps(
            {
                "requests": len(found),
                "seconds": seconds,
                "failed": errors[:10],
                "left": sum(seen.left for seen in found),
                "ttft_ms_p95": p95(first),
                "itl_ms_p95": p95(gaps),
                "tokens_per_second": tokens / seconds,
                "identical": identical,
                "checked": len(checked),
                "start_seconds": [server.start_seconds, again.start_seconds],
                "own_bytes": own,
            }
        )
    )
    grown = options.minutes > 0 and own[-1][1] > (1 + MOST_GROWTH) * own[0][1]
    fails = bool(errors) or identical < len(checked) or again.start_seconds > MOST_START or grown
    return 1 if fails else 0


if __name__ == "__main__":
    sys.exit(main())
