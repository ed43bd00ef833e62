"""What a service asks of an engine: turns of a conversation, threads, cancelling, memory. Checks, and measures.

    python benchmarks/service.py build/smollm2-w8a8

Every figure is one of this run; the last line is JSON, and a check that fails ends with exit code 1.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import runtime
from quasar.text import Message
from runtime.events import gather

QUESTIONS = (
    "What should I see in Lisbon in three days?",
    "And if it rains?",
    "Which of these are free?",
    "How do I get from one to the next?",
    "Write that as a list with times.",
)
THREADS, REQUESTS = 8, 25
GENERATIONS = 2000
_MEGABYTE = 1 << 20


def timed(events: Iterator[runtime.Event]) -> tuple[runtime.Generation, float]:
    """A generation, and the milliseconds until its first token came."""
    start = time.perf_counter()
    first = next(events)
    ms = 1000 * (time.perf_counter() - start)
    return gather([first, *events]), ms


def conversation(engine: runtime.Engine, turns: int, max_new_tokens: int) -> dict[str, Any]:
    """A conversation that keeps its cache against fresh prefills of the whole history, turn by turn.

    Between its turns the other sequence has the cache, so the time to the first token
    includes swapping it back in.
    """
    messages: list[Message] = []
    identical = 0
    with engine.session() as session:
        for turn in range(turns):
            question = f"{QUESTIONS[turn % len(QUESTIONS)]} (question {turn + 1})"
            messages.append(Message(role="user", content=question))
            fresh, fresh_ms = timed(engine.stream(messages, max_new_tokens=max_new_tokens))
            answer, reused_ms = timed(session.stream(question, max_new_tokens=max_new_tokens))
            identical += answer.token_ids == fresh.token_ids
            messages.append(Message(role="assistant", content=answer.text))
    length, reused = answer.stats.prompt_tokens, answer.stats.reused_tokens
    print(f"{turns} turns: {identical} answers identical to fresh prefills")
    print(
        f"turn {turns}, {length} tokens, {reused} of them reused: first token after {reused_ms:.0f} ms, "
        f"fresh {fresh_ms:.0f} ms, ratio {reused_ms / fresh_ms:.3f}"
    )
    return {"turns": turns, "identical": identical, "ratio": reused_ms / fresh_ms, "tokens": length}


def threads(engine: runtime.Engine, max_new_tokens: int) -> dict[str, Any]:
    """Requests from several threads against the same ones, one by one."""
    prompts = [f"{question} ({place})" for question in QUESTIONS for place in range(THREADS * REQUESTS // 5)]

    def run(index: int) -> tuple[int, ...]:
        temperature = 0.8 * (index % 2)
        generation = engine.generate(prompts[index], max_new_tokens=max_new_tokens, temperature=temperature, seed=index)
        return generation.token_ids

    start = time.perf_counter()
    alone = [run(index) for index in range(len(prompts))]
    alone_seconds = time.perf_counter() - start
    together: dict[int, tuple[int, ...]] = {}

    def serve(thread: int) -> None:
        for index in range(thread, len(prompts), THREADS):
            together[index] = run(index)

    start = time.perf_counter()
    workers = [threading.Thread(target=serve, args=(thread,)) for thread in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    identical = sum(together[index] == alone[index] for index in range(len(prompts)))
    print(
        f"{THREADS} threads x {REQUESTS} requests: {identical} of {len(prompts)} as one by one; "
        f"{seconds:.1f} s, one by one {alone_seconds:.1f} s"
    )
    return {"requests": len(prompts), "identical": identical, "seconds": seconds, "alone_seconds": alone_seconds}


def cancelling(engine: runtime.Engine) -> dict[str, Any]:
    """How long after a signal from another thread a stream ends, and how many rounds it still made."""
    latencies, rounds = [], []
    for _ in range(20):
        cancel, signalled = threading.Event(), [0.0]

        def signal(cancel: threading.Event = cancel, signalled: list[float] = signalled) -> None:
            signalled[0] = time.perf_counter()
            cancel.set()

        timer = threading.Timer(0.1, signal)
        timer.start()
        after = 0
        for event in engine.stream(QUESTIONS[0], max_new_tokens=4000, ignore_eos=True, cancel=cancel):
            after += cancel.is_set() and bool(event.token_ids)
        latencies.append(1000 * (time.perf_counter() - signalled[0]))
        rounds.append(after)
        timer.join()
    usable = engine.generate(QUESTIONS[0], max_new_tokens=8).stats.tokens == 8
    print(
        f"cancelled 20 times: at most {max(rounds)} round after the signal, {max(latencies):.1f} ms at most; "
        f"usable afterwards: {'yes' if usable else 'no'}"
    )
    return {"rounds": max(rounds), "ms": max(latencies), "usable": usable}


def memory(engine: runtime.Engine) -> dict[str, Any]:
    """Growth of resident memory over many short generations, half of them drawn, with conversations and streams."""

    def some(count: int) -> None:
        for seed in range(count):
            if seed % 4 == 3:
                with engine.session() as session:
                    session.generate("Hello", max_new_tokens=3)
            else:
                engine.generate("Hello", max_new_tokens=3, temperature=seed % 2, seed=seed, stop="zz", logprobs=1)

    some(200)
    before = {kind: resident_bytes(kind) for kind in ("VmRSS", "RssAnon")}
    some(GENERATIONS)
    grown = {kind: (resident_bytes(kind) - bytes_before) / _MEGABYTE for kind, bytes_before in before.items()}
    print(
        f"{GENERATIONS} short generations: {grown['VmRSS']:+.2f} MB of resident memory, of which the process's own "
        f"{grown['RssAnon']:+.2f} MB; the rest are pages of the mapped weight files"
    )
    return {"generations": GENERATIONS, "megabytes": grown["VmRSS"], "own_megabytes": grown["RssAnon"]}


def resident_bytes(kind: str, process: int | str = "self") -> int:
    """Resident memory of a process (Linux): VmRSS is all of it, RssAnon leaves mapped files out."""
    status = Path(f"/proc/{process}/status")
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell resident memory in {status}")


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, metavar="DIR")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    options = parser.parse_args()
    with runtime.load(options.engine) as engine:
        engine.warmup()
        found = {
            "conversation": conversation(engine, options.turns, options.max_new_tokens),
            "threads": threads(engine, 16),
            "cancelling": cancelling(engine),
            "memory": memory(engine),
        }
    print(json.dumps(found))
    exact = found["conversation"]["identical"] == options.turns
    shared = found["threads"]["identical"] == found["threads"]["requests"]
    return 0 if exact and shared and found["cancelling"]["usable"] else 1


if __name__ == "__main__":
    sys.exit(main())
