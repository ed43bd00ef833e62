"""Many requests at once: every answer must be the one that it is alone, and what sharing passes brings.

`verify_together` lets requests come and go at random; `bench_together` keeps a number of them under way.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any, cast

import numpy as np

from evaluation.exactness import first_difference
from quasar.text import Prompt
from runtime.api import Engine
from runtime.option_keywords import OptionsDict

# Seconds between two requests of one client, at most.
_PAUSE = 0.2
# Of a cancelled request, the events that are read before, at most.
_MOST_EVENTS = 12
# Times that every number and arm is run.
ROUNDS = 2
# Way to decode → its options.
ARMS: Mapping[str, OptionsDict] = {"plain": {"drafter": "none"}, "auto": {"drafter": "auto"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class TogetherExactness:
    """What `verify --concurrency` counted.

    `cancelled` requests count as identical if what they gave until then is the beginning of the answer alone. `widest`:
    sequences of one pass, at most. `differences`: prompt, and the first token that differs.
    """

    prompts: int
    identical: int
    cancelled: int
    tokens: int
    concurrency: int
    widest: int
    drafted: int
    differences: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return asdict(self)


def verify_together(
    engine: Engine,
    prompts: Sequence[Prompt],
    options: OptionsDict,
    *,
    concurrency: int,
    cancel_share: float = 0.0,
    seed: int = 0,
    on_prompt: Callable[[], None] = lambda: None,
) -> TogetherExactness:
    """Answer every prompt alone and plainly, then all of them by `concurrency` clients, and compare.

    A client begins its next request after a random pause; a random share of the requests is cancelled after some
    events, by a signal or by a stream that is closed.
    """
    plainly = cast("OptionsDict", {**options, "drafter": "none", "num_draft_tokens": None})
    alone = []
    for prompt in prompts:
        alone.append(engine.generate(prompt.messages, **plainly).token_ids)
        on_prompt()
    random = np.random.default_rng(seed)
    leaves = [int(random.integers(1, _MOST_EVENTS + 1)) if random.random() < cancel_share else None for _ in prompts]
    pauses = random.uniform(0, _PAUSE, len(prompts)).tolist()
    found: dict[int, tuple[int, ...]] = {}
    left: set[int] = set()
    drafted: dict[int, int] = {}
    before = engine.metrics()

    def ask(place: int) -> None:
        time.sleep(pauses[place])
        cancel = threading.Event()
        given = cast("OptionsDict", {**options, "cancel": cancel})
        tokens: list[int] = []
        stream = engine.stream(prompts[place].messages, **given)
        for count, event in enumerate(stream, start=1):
            tokens += event.token_ids
            drafted[place] = drafted.get(place, 0) + event.drafted
            if event.finish_reason == "cancelled":
                left.add(place)
            if count == leaves[place] and event.finish_reason is None:
                if place % 2:
                    left.add(place)
                    break
                cancel.set()
        getattr(stream, "close", lambda: None)()
        found[place] = tuple(tokens)
        on_prompt()

    run_clients(concurrency, len(prompts), ask)
    differences = []
    for place, expected in enumerate(alone):
        # An answer that came to its end by itself is compared as a whole.
        expected = expected[: len(found[place])] if place in left else expected
        if found[place] != expected:
            differences.append((place, first_difference(found[place], expected)))
    return TogetherExactness(
        prompts=len(prompts),
        identical=len(prompts) - len(differences),
        cancelled=len(left),
        tokens=sum(map(len, found.values())),
        concurrency=concurrency,
        widest=max(engine.metrics().since(before).sequences_per_pass, default=0),
        drafted=sum(drafted.values()),
        differences=tuple(differences),
    )


def bench_together(
    engine: Engine,
    prompts: Sequence[Prompt],
    concurrencies: Sequence[int],
    *,
    max_new_tokens: int,
    rounds: int = ROUNDS,
    arms: Mapping[str, OptionsDict] = ARMS,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Answer every prompt with so many clients at once, the arms and numbers by turns, `rounds` times.

    Returns `concurrency` → number → arm → `tokens_per_second` (of all requests, prompts' time included), `ttft_ms` and
    `itl_ms` (to the first token of a request, and from one token to the next; tokens of one event come at equal
    distances) with `p50` and `p95`, and `sequences_per_pass` and `acceptance_length`, means.
    """
    for given in arms.values():
        warm = cast("OptionsDict", {**given, "max_new_tokens": 8, "ignore_eos": True})
        engine.generate(prompts[0].messages, **warm)
    runs: dict[tuple[int, str], list[_Run]] = {}
    for turn in range(rounds):
        order = [(number, arm) for number in concurrencies for arm in arms]
        for number, arm in order if turn % 2 == 0 else reversed(order):
            options = cast("OptionsDict", {**arms[arm], "max_new_tokens": max_new_tokens, "ignore_eos": True})
            runs.setdefault((number, arm), []).append(_run(engine, prompts, number, options))
            on_run()
    return {
        "concurrency": {
            str(number): {arm: _summary(runs[number, arm]) for arm in arms} for number in dict.fromkeys(concurrencies)
        },
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "machine": engine.record.machine,
    }


def run_clients(concurrency: int, count: int, ask: Callable[[int], None]) -> None:
    """Call `ask` for 0 to `count` - 1 from so many threads, each with its next number; raises what one of them did."""
    lock = threading.Lock()
    left = iter(range(count))
    errors: list[BaseException] = []

    def client() -> None:
        while not errors:
            with lock:
                place = next(left, None)
            if place is None:
                return
            try:
                ask(place)
            except BaseException as error:  # raised where the clients were started
                errors.append(error)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One run of an arm at one concurrency: what was emitted when."""

    seconds: float
    tokens: int
    first_ms: list[float]
    between_ms: list[float]
    decoded: int
    rounds: int
    sequences_per_pass: float


def _run(engine: Engine, prompts: Sequence[Prompt], concurrency: int, options: OptionsDict) -> _Run:
    first: list[float] = []
    between: list[float] = []
    totals = {"tokens": 0, "decoded": 0, "rounds": 0}
    lock = threading.Lock()

    def ask(place: int) -> None:
        asked = last = time.perf_counter()
        mine: list[float] = []
        tokens = 0
        for event in engine.stream(prompts[place].messages, **options):
            now = time.perf_counter()
            if event.token_ids:
                if tokens == 0:
                    began = 1e3 * (now - asked)
                else:
                    mine += [1e3 * (now - last) / len(event.token_ids)] * len(event.token_ids)
                tokens, last = tokens + len(event.token_ids), now
        stats = event.stats
        assert stats is not None
        with lock:
            first.append(began)
            between.extend(mine)
            totals["tokens"] += tokens
            totals["decoded"] += tokens - 1
            totals["rounds"] += stats.rounds

    before = engine.metrics()
    start = time.perf_counter()
    run_clients(concurrency, len(prompts), ask)
    seconds = time.perf_counter() - start
    held = engine.metrics().since(before).sequences_per_pass
    passes = sum(held.values())
    return _Run(
        seconds=seconds,
        first_ms=first,
        between_ms=between,
        sequences_per_pass=sum(width * count for width, count in held.items()) / max(1, passes),
        **totals,
    )


def _summary(runs: Sequence[_Run]) -> dict[str, Any]:
    return {
        "tokens_per_second": sum(one.tokens for one in runs) / sum(one.seconds for one in runs),
        "ttft_ms": _percentiles([ms for one in runs for ms in one.first_ms]),
        "itl_ms": _percentiles([ms for one in runs for ms in one.between_ms]),
        "acceptance_length": sum(one.decoded for one in runs) / max(1, sum(one.rounds for one in runs)),
        "sequences_per_pass": sum(one.sequences_per_pass for one in runs) / len(runs),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th and the 95th percentile."""
    if len(values) < 2:
        return {"p50": sum(values), "p95": sum(values)}
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94]}
