"""What a draft head costs and brings: a step beside a pass, acceptance and speed by category, with and without it.

    python benchmarks/draft_head.py DIR --prompts FILE.jsonl [--limit 48] [--max-new-tokens 128] [--json FILE]

DIR is an engine directory with a draft head. Steps and passes of one position are timed in turn, after 256 cached
positions; what counts is the median of the ratios. Then each prompt is answered by plain decoding, by `auto` without
the head, by `auto` and by the head alone, in an order that rotates. Speeds are those of decoding: tokens after the
first per second of the rounds. Engine and head share a thread pool, as in the command lines. What shares the machine
disturbs the figures: look at the ratios. Exit code 1: tokens differ.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from engines import OnnxRuntimeOptions, load_engine
from engines.session import Positions
from quasar.text import Prompt
from quasar.text.prompts import in_turn, read_prompts
from runtime.option_keywords import OptionsDict
from runtime.stats import Stats

PLAIN, WITHOUT, AUTO, HEAD = "plain", "auto without the head", "auto", "head alone"
ARMS: dict[str, OptionsDict] = {
    PLAIN: {"drafter": "none"},
    WITHOUT: {"drafter": "suffix,recycling"},
    AUTO: {"drafter": "auto"},
    HEAD: {"drafter": "eagle"},
}
_CACHED, _ROUNDS, _WARM = 256, 60, 10
_WIDTHS = (1, 4, 8)


def time_steps(directory: Path) -> dict[str, Any]:
    """Milliseconds of a pass of one position, of head steps by width, and the memory that the head takes."""
    loaded = load_engine(directory, options=OnnxRuntimeOptions())
    session, head = loaded.session, loaded.draft_head
    if head is None:
        raise SystemExit(f"{directory} has no draft head that these kernels run: python -m export add-head DIR HEAD")
    files = loaded.directory.manifest.draft_head
    assert files is not None
    random = np.random.default_rng(0)
    states = random.standard_normal((_CACHED, files.hidden_size), np.float32)
    ids = random.integers(0, session.contract.vocab_size, _CACHED)
    for chunk in session.contract.prompt_chunks(_CACHED):
        session.run(ids[chunk], chunk.start, 1)
    head.run([Positions(tokens=ids, cache_length=0, num_logits=1)], states)
    ratios: dict[int, list[float]] = {width: [] for width in _WIDTHS}
    passes, steps = [], []
    for number in range(_WARM + _ROUNDS):
        start = time.perf_counter()
        session.run(ids[:1], _CACHED, 1)
        took = time.perf_counter() - start
        for width in _WIDTHS:
            positions = Positions(tokens=ids[:width], cache_length=_CACHED, num_logits=width)
            start = time.perf_counter()
            head.run([positions], states[:width])
            step = time.perf_counter() - start
            if number >= _WARM:
                ratios[width].append(step / took)
                if width == 1:
                    passes.append(took)
                    steps.append(step)
    taken = head.memory()
    loaded.session.close()
    head.close()
    return {
        "pass_ms": round(1e3 * statistics.median(passes), 3),
        "step_ms": round(1e3 * statistics.median(steps), 3),
        "step_over_pass": {width: round(statistics.median(found), 3) for width, found in ratios.items()},
        "weights_mb": round((directory / files.weights).stat().st_size / 1e6, 1),
        "read_mb": round(taken.weights / 1e6, 1),
        "cache_mb_a_slot": round(taken.cache / 1e6, 1),
    }


def answer(
    engine: runtime.Engine, rows: Sequence[Prompt], max_new_tokens: int
) -> tuple[dict[str, dict[str, list[Stats]]], int]:
    """Statistics by arm and category, and how many prompts were answered differently."""
    found: dict[str, dict[str, list[Stats]]] = {arm: defaultdict(list) for arm in ARMS}
    names, different = list(ARMS), 0
    for number, row in enumerate(rows):
        answers = {}
        for arm in (*names[number % len(names) :], *names[: number % len(names)]):
            options: OptionsDict = {**ARMS[arm], "max_new_tokens": max_new_tokens}
            done = engine.generate(row.messages, **options)
            answers[arm] = done.token_ids
            found[arm][row.category].append(done.stats)
        different += len(set(answers.values())) > 1
        print(f"{number + 1} of {len(rows)}", end="\r", file=sys.stderr, flush=True)
    return found, different


def figures(stats: Sequence[Stats], plain: Sequence[Stats]) -> dict[str, float]:
    """Acceptance length and speed of one arm, over plain decoding of the same prompts."""
    tokens, rounds = sum(one.tokens - 1 for one in stats), sum(one.rounds for one in stats)
    seconds = sum(one.decode_seconds for one in stats)
    plain_speed = sum(one.tokens - 1 for one in plain) / sum(one.decode_seconds for one in plain)
    return {
        "acceptance_length": round(tokens / max(rounds, 1), 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "over_plain": round(tokens / seconds / plain_speed, 3),
    }


def main() -> None:
    """Time, answer, print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=48, help="prompts, one of each category in turn")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runtime.share_threads()
    result: dict[str, Any] = {"steps": time_steps(options.engine)}
    print(json.dumps(result["steps"]))
    rows = in_turn(read_prompts(options.prompts), options.limit)
    with runtime.load(options.engine) as engine:
        engine.warmup()
        found, different = answer(engine, rows, options.max_new_tokens)
    categories = sorted(found[PLAIN])
    result["arms"] = {
        arm: {
            **{name: figures(by[name], found[PLAIN][name]) for name in categories},
            "all": figures(list(chain(*by.values())), list(chain(*found[PLAIN].values()))),
        }
        for arm, by in found.items()
    }
    result["prompts"], result["different"] = len(rows), different
    print("| |", " | ".join(ARMS), "|")
    print("|---|" + "---|" * len(ARMS))
    for name in (*categories, "all"):
        cells = [result["arms"][arm][name] for arm in ARMS]
        print(
            f"| {name} |", " | ".join(f"{one['acceptance_length']:.2f}, {one['over_plain']:.2f}×" for one in cells), "|"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
