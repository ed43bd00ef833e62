"""Throughput of many requests at once, here and with OpenVINO GenAI's continuous batching, by turns in one run.

    python benchmarks/openvino_peer.py ENGINE MODEL.gguf --peer-python OTHER/bin/python --prompts FILE.jsonl

OpenVINO GenAI lies in an environment of its own (`pip install openvino-genai`) and reads a GGUF file with weights in
Q8_0. Both continue the same texts, write as many tokens, and decode greedily; while one runs the other waits for its
next question. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

CONCURRENCIES = (1, 8)
ROUNDS = 3


def serve_peer(model: str, cache_gb: int) -> None:
    """The child: answers lines of JSON with the seconds that a batch took."""
    genai = import_module("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = cache_gb, max(CONCURRENCIES)
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU")
    print(json.dumps({"version": genai.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        configs = []
        for _ in asked["prompts"]:
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.apply_chat_template = asked["tokens"], True, False
            configs.append(config)
        start = time.perf_counter()
        found = pipeline.generate(asked["prompts"], configs)
        print(json.dumps({"seconds": time.perf_counter() - start, "answers": len(found)}), flush=True)


class Peer:
    """The other process."""

    def __init__(self, python: str, model: Path, cache_gb: int) -> None:
        command = [python, __file__, "--child", str(model), "--cache-gb", str(cache_gb)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def seconds(self, prompts: list[str], tokens: int) -> float:
        """How long it took for these prompts together."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("the peer ended: see what it wrote")


def main() -> None:
    """Both by turns, at each number of requests, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", type=Path)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cache-gb", type=int, default=2)
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        serve_peer(options.child, options.cache_gb)
        return

    import runtime
    from quasar.text import read_prompts

    rows = read_prompts(options.prompts, max(CONCURRENCIES))
    peer = Peer(options.peer_python, options.model, options.cache_gb)
    arms = ("plain", "auto", "peer")
    speeds: dict[tuple[int, str], list[float]] = {(count, arm): [] for count in CONCURRENCIES for arm in arms}
    with runtime.load(options.engine, max_sequences=max(CONCURRENCIES)) as engine:
        texts = [str(row.messages[-1]["content"]) for row in rows]

        def seconds(arm: str, count: int) -> float:
            if arm == "peer":
                return peer.seconds(texts[:count], options.tokens)
            drafter = "none" if arm == "plain" else "auto"
            start = time.perf_counter()
            engine.generate(
                texts[:count],
                max_new_tokens=options.tokens,
                ignore_eos=True,
                drafter=drafter,
                chat_template=False,
            )
            return time.perf_counter() - start

        for number in range(1 + options.rounds):
            for count in CONCURRENCIES:
                for arm in arms[number % 3 :] + arms[: number % 3]:
                    took = seconds(arm, count)
                    if number:
                        speeds[count, arm].append(count * options.tokens / took)
        machine = engine.record.machine
    peer.close()
    found = {str(count): {arm: median(speeds[count, arm]) for arm in arms} for count in CONCURRENCIES}
    for number_of, by_arm in found.items():
        print(f"{number_of} requests: " + ", ".join(f"{arm} {speed:.1f} tokens/s" for arm, speed in by_arm.items()))
    print(json.dumps({"tokens_per_second": found, "openvino_genai": peer.version, "machine": machine}))


if __name__ == "__main__":
    main()
