"""Decoding of single requests here and with llama.cpp's server, plain and with drafts, prompt by prompt by turns.

    python benchmarks/llamacpp_peer.py ENGINE MODEL-Q4_0.gguf --server llama-server --prompts FILE.jsonl \
        --arm "--spec-type ngram-cache" --arm "--spec-type draft-simple -md SMALL-Q4_0.gguf --spec-draft-n-max 5" \
        --drafter auto auto,hierarchical:SMALL

Every arm of llama.cpp is a server of its own, and none does anything while another arm answers. All get the same token
ids, write as many tokens, decode greedily with two threads, and read every prompt anew. What counts is decoding alone,
as both say of themselves: a prompt's time does not. Answers here must be those of plain decoding; llama.cpp's are of
another quantization. The last line is JSON.
"""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime
from quasar.text import read_prompts

THREADS = 2
_STARTING = 120.0


@dataclass(slots=True)
class Sums:
    """Tokens and seconds of an arm's decoding."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Of one answer."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Server:
    """A llama.cpp server with one slot."""

    def __init__(self, binary: str, model: Path, arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [binary, "-m", str(model), "-t", str(THREADS), "-c", "4096", "-np", "1", "--port", str(port)]
        self._process = subprocess.Popen(
            [*command, *shlex.split(arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + _STARTING
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise SystemExit(f"{binary} {arguments}: it did not start; run it by hand to see why")
            time.sleep(0.2)

    def answer(self, token_ids: Sequence[int], tokens: int) -> dict[str, Any]:
        """Its `timings` for one answer."""
        asked = {
            "prompt": list(token_ids),
            "n_predict": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"{self._url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            timings: dict[str, Any] = json.loads(answer.read())["timings"]
        return timings

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health") as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False


def main() -> int:
    """All arms by turns; 1 if an answer here differs from the plain one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--server", default="llama-server", help="llama.cpp's server")
    parser.add_argument("--arm", action="append", default=[], help="its arguments, beside plain decoding")
    parser.add_argument("--drafter", nargs="+", default=["auto"], help="here, beside plain decoding")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=13)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()
    runtime.share_threads()
    engine = runtime.load(options.engine)
    engine.warmup()
    arms = ("", *options.arm)
    servers: dict[str, Server] = {}
    sums: dict[tuple[str, str], Sums] = {("llama.cpp", arm): Sums() for arm in arms}
    sums |= {("here", drafter): Sums() for drafter in ("none", *options.drafter)}
    accepted, differing = dict.fromkeys(arms, 0.0), 0
    try:
        for arm in arms:
            servers[arm] = Server(options.server, options.model, arm)
        for number, prompt in enumerate(read_prompts(options.prompts, options.limit)):
            token_ids = engine.encode(list(prompt.messages)).tolist()
            answers = {}
            order = list(sums)
            first = number % len(order)
            for where, name in [*order[first:], *order[:first]]:
                if where == "here":
                    made = engine.generate(
                        list(prompt.messages), max_new_tokens=options.max_new_tokens, ignore_eos=True, drafter=name
                    )
                    answers[name] = made.token_ids
                    sums[where, name].add(len(made.token_ids) - 1, made.stats.decode_seconds)
                else:
                    timings = servers[name].answer(token_ids, options.max_new_tokens)
                    sums[where, name].add(timings["predicted_n"], timings["predicted_ms"] / 1000)
                    accepted[name] += timings.get("draft_n_accepted", 0)
            differing += sum(answer != answers["none"] for answer in answers.values())
    finally:
        for server in servers.values():
            server.close()
    plain = sums["llama.cpp", ""].speed
    for (where, name), one in sums.items():
        share = f", {accepted[name] / one.tokens:.2f} of the tokens accepted drafts" if where == "llama.cpp" else ""
        print(f"{where}, {name or 'plain'}: {one.speed:.1f} tokens/s, {one.speed / plain:.2f}{share}")
    print(f"{differing} answers here differ from the plain ones")
    print(json.dumps({f"{where} {name}".strip(): one.speed for (where, name), one in sums.items()}))
    engine.close()
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
