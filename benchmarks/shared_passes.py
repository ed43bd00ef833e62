"""What sharing passes does to those who share: long prompts beside short ones, beginnings that are shared, memory.

    python benchmarks/shared_passes.py build/smollm2-w8a8

Every figure is one of this run; the last line is JSON, and a check that fails ends with exit code 1. Memory is this
process's own (RssAnon), so that weights, which are mapped from files, do not count.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
from service import resident_bytes

import runtime

# Short prompts come so often, long ones every two seconds, for so long.
SHORT_EVERY, LONG_EVERY, SECONDS = 0.25, 2.0, 30.0
SHORT_TOKENS, LONG_TOKENS = 24, 3000
SHARED, REQUESTS, OWN_TOKENS = 1000, 8, 64
# Of the chunk times that a short prompt may wait longer beside long ones, and of the tokens that are distinct.
MOST_CHUNKS, MOST_FED = 3.0, 1.15
MEMORY_SHARE = 0.05
# While requests warm up, the C library's heaps of the threads fill: of 40,000 requests the first 4,000 took 4.2 MB, the
# next 6,000 0.9 MB, the last 12,000 0.2 MB. Once in between a heap grew by 0.9 MB at a time: what is more is a leak.
GENERATIONS, WARM = 10_000, 10_000
_MOST_GROWN = 2 << 20
# Of the answers that hold their slots: more than a stream is ahead of its reader.
_UNREAD_TOKENS = 32
_MEGABYTE = 1 << 20


def tokens(engine: runtime.Engine, count: int, seed: int) -> list[int]:
    """Random ids, all of them ordinary tokens."""
    ids = np.random.default_rng(seed).integers(1000, min(engine.manifest.contract.vocab_size, 40_000), count)
    return [int(one) for one in ids]


def first_token_ms(engine: runtime.Engine, prompt: list[int], max_new_tokens: int) -> float:
    """Milliseconds from the call to the first token; the answer is read to its end."""
    start = time.perf_counter()
    events = engine.stream(prompt, max_new_tokens=max_new_tokens, ignore_eos=True)
    next(events)
    ms = 1e3 * (time.perf_counter() - start)
    for _ in events:
        pass
    return ms


def every(seconds: float, duration: float, ask: Callable[[int], None]) -> None:
    """Call `ask` in a thread of its own again and again; waits for all of them."""
    running = []
    start = time.perf_counter()
    for number in range(int(duration / seconds)):
        time.sleep(max(0.0, start + number * seconds - time.perf_counter()))
        running.append(threading.Thread(target=ask, args=(number,)))
        running[-1].start()
    for one in running:
        one.join()


def long_beside_short(engine: runtime.Engine, seconds: float) -> dict[str, Any]:
    """The time to the first token of short prompts, with long ones coming and without."""
    long_tokens = min(LONG_TOKENS, engine.manifest.contract.max_length - 16)
    chunk = engine.manifest.contract.prefill_chunk
    chunk_ms = min(first_token_ms(engine, tokens(engine, chunk, 90 + turn), 1) for turn in range(3))

    def measure(*, with_long: bool) -> float:
        found: list[float] = []

        def short(number: int) -> None:
            found.append(first_token_ms(engine, tokens(engine, SHORT_TOKENS, number), 8))

        def long(number: int) -> None:
            first_token_ms(engine, tokens(engine, long_tokens, 1000 + number), 2)

        others = threading.Thread(target=every, args=(LONG_EVERY, seconds, long))
        if with_long:
            others.start()
        every(SHORT_EVERY, seconds, short)
        if with_long:
            others.join()
        return quantiles(found, n=100, method="inclusive")[94]

    alone, beside = measure(with_long=False), measure(with_long=True)
    chunks = (beside - alone) / chunk_ms
    print(
        f"first token of short prompts, p95: {alone:.0f} ms, with a prompt of {long_tokens} tokens every "
        f"{LONG_EVERY:.0f} s {beside:.0f} ms: {chunks:.1f} times the {chunk_ms:.0f} ms of a chunk more"
    )
    return {"alone_ms": alone, "beside_ms": beside, "chunk_ms": chunk_ms, "chunks": chunks}


def shared_beginning(engine: runtime.Engine, shared: int) -> dict[str, Any]:
    """Requests that come at once and begin alike: what is fed, and whether their answers are those of cold ones."""
    beginning = tokens(engine, shared, 7)
    prompts = [[*beginning, *tokens(engine, OWN_TOKENS, 70 + place)] for place in range(REQUESTS)]
    cold = [engine.generate(prompt, max_new_tokens=16, ignore_eos=True).token_ids for prompt in prompts]
    before = engine.metrics()
    warm: dict[int, tuple[int, ...]] = {}

    def ask(place: int) -> None:
        answer = engine.generate(prompts[place], max_new_tokens=16, ignore_eos=True, cache_salt="shared")
        warm[place] = answer.token_ids

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fed = engine.metrics().since(before).prompt_tokens
    distinct = shared + REQUESTS * OWN_TOKENS
    identical = sum(warm[place] == cold[place] for place in range(REQUESTS))
    print(
        f"{REQUESTS} prompts with the same {shared} tokens at the beginning: {fed} fed of {distinct} distinct ones "
        f"({fed / distinct:.2f}), {identical} answers identical to cold ones"
    )
    return {"fed": fed, "distinct": distinct, "ratio": fed / distinct, "identical": identical}


def memory_of_slots(engine: runtime.Engine) -> dict[str, Any]:
    """Own memory that full slots take, against what `memory()` says; then whether many requests leave any."""
    contract = engine.manifest.contract
    engine.warmup()
    first_token_ms(engine, tokens(engine, contract.prefill_chunk, 1), 2)
    slots = engine.metrics().slots
    before = resident_bytes("RssAnon")
    prompts = [tokens(engine, contract.max_length - _UNREAD_TOKENS, 10 + place) for place in range(slots)]
    # Answers that nobody reads on: each keeps its slot, where prompts that are fed one after the other share one.
    # A step without drafts is a token: a stream is some steps ahead of its reader, not the whole answer.
    streams = [
        engine.stream(prompt, max_new_tokens=_UNREAD_TOKENS, ignore_eos=True, drafter="none") for prompt in prompts
    ]
    for stream in streams:
        next(stream)
    said = engine.memory().cache
    took = resident_bytes("RssAnon") - before
    for stream in streams:
        for _ in stream:
            pass
    print(f"{slots} full slots: {took / _MEGABYTE:.0f} MB more, memory() says {said / _MEGABYTE:.0f} MB")
    return {"slots": slots, "took": took, "said": said, "off": abs(took / said - 1)}


def many_requests(engine: runtime.Engine, count: int) -> dict[str, Any]:
    """Own memory over many short requests, eight at a time, and over consumers that vanish."""

    def run(number: int, first: int) -> None:
        def ask(place: int) -> None:
            for index in range(first + place, first + number, 8):
                stream = engine.stream([1000 + index % 500, 7, 9], max_new_tokens=3, ignore_eos=True)
                next(stream)
                if index % 10:
                    for _ in stream:
                        pass
                else:
                    getattr(stream, "close", lambda: None)()

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(WARM, 0)
    before = resident_bytes("RssAnon")
    run(count, WARM)
    grown = resident_bytes("RssAnon") - before
    print(f"{count} requests, every tenth left by its consumer: {grown / _MEGABYTE:+.1f} MB")
    return {"requests": count, "grown": grown}


def main() -> int:
    """Run all of it; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each half of the test with long prompts")
    parser.add_argument("--requests", type=int, default=GENERATIONS, help="of the test of memory")
    options = parser.parse_args()
    with runtime.load(options.engine) as engine:
        found = {
            "prefix": shared_beginning(engine, SHARED),
            "long_prompts": long_beside_short(engine, options.seconds),
            "requests": many_requests(engine, options.requests),
            "machine": engine.record.machine,
        }
    with runtime.load(options.engine, max_sequences=4) as engine:
        found["slots"] = memory_of_slots(engine)
    print(json.dumps(found))
    failed = [
        name
        for name, holds in {
            "a beginning that is shared is fed once": found["prefix"]["ratio"] <= MOST_FED,
            "answers do not depend on what is shared": found["prefix"]["identical"] == REQUESTS,
            "short prompts wait for three chunks at most": found["long_prompts"]["chunks"] <= MOST_CHUNKS,
            "slots take what is said": found["slots"]["off"] <= MEMORY_SHARE,
            "requests leave no memory": found["requests"]["grown"] < _MOST_GROWN,
        }.items()
        if not holds
    ]
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
