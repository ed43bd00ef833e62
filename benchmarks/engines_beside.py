"""Engines of one model beside each other: passes by width, and decoding, plain and with drafts, prompt by prompt.

    python benchmarks/engines_beside.py build/w8a8 build/w4a8 --prompts FILE.jsonl

Passes of all engines alternate, and so do their answers, so that a drift of the machine falls on all of them: compare
ratios. Every answer with drafts must have the tokens of the plain one. Tokens count where they are emitted; the time of
a prompt does not. Fidelity is what each manifest says. The last line is JSON; an answer that differs ends with exit
code 1.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import runtime
from engines.latency import measure_interleaved
from engines.loading import load_engine
from quasar.text.prompts import read_prompts

WIDTHS = (1, 2, 4, 8, 16)
ARMS = ("none", "auto")


def measure_passes(directories: list[Path], cached: int) -> list[dict[int, float]]:
    """Median milliseconds by width of each engine."""
    sessions = [load_engine(directory).session for directory in directories]
    surfaces = measure_interleaved(sessions, lengths=[cached], widths=WIDTHS)
    for session in sessions:
        session.close()
    return [surface[cached] for surface in surfaces]


def measure_answers(directories: list[Path], prompts: list[Any], tokens: int) -> tuple[list[dict[str, Any]], int]:
    """Of each engine and arm tokens per second and acceptance length; and how many answers differ from plain ones."""
    engines = [runtime.load(directory) for directory in directories]
    seconds = [dict.fromkeys(ARMS, 0.0) for _ in engines]
    emitted = [dict.fromkeys(ARMS, 0) for _ in engines]
    rounds = [dict.fromkeys(ARMS, 0) for _ in engines]
    differing = 0
    for engine in engines:
        for arm in ARMS:
            engine.generate(prompts[0].messages, max_new_tokens=16, ignore_eos=True, drafter=arm)
    for prompt in prompts:
        for place, engine in enumerate(engines):
            answers = {}
            for arm in ARMS:
                answer = engine.generate(prompt.messages, max_new_tokens=tokens, ignore_eos=True, drafter=arm)
                answers[arm] = answer.token_ids
                stats = answer.stats
                seconds[place][arm] += stats.decode_seconds
                emitted[place][arm] += len(answer.token_ids) - 1
                rounds[place][arm] += stats.rounds
            differing += answers["auto"] != answers["none"]
    found = [
        {
            arm: {
                "tokens_per_second": emitted[place][arm] / seconds[place][arm],
                "acceptance_length": emitted[place][arm] / max(1, rounds[place][arm]),
            }
            for arm in ARMS
        }
        for place in range(len(engines))
    ]
    for engine in engines:
        engine.close()
    return found, differing


def main() -> int:
    """Measure, print a table; 1 if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+", help="the first one is what the others are compared with")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=13)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--cached", type=int, default=256, help="positions before a pass that is timed")
    options = parser.parse_args()
    # Threads that spin for one engine would take the cores from the other.
    runtime.share_threads()
    passes = measure_passes(options.engines, options.cached)
    prompts = read_prompts(options.prompts, limit=options.limit)
    answers, differing = measure_answers(options.engines, prompts, options.max_new_tokens)
    found = []
    widths = " | ".join(f"t({width})" for width in WIDTHS)
    print(f"engine | KL, prompts / answers | {widths} | plain | auto | tokens a round")
    for directory, by_width, arms in zip(options.engines, passes, answers, strict=True):
        fidelity = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["fidelity"]
        kl, answers_kl = fidelity["mean_kl_nats"], fidelity["continuation"]["mean_kl_nats"]
        plain, auto = arms["none"], arms["auto"]
        times = " | ".join(f"{by_width[width]:.1f}" for width in WIDTHS)
        print(
            f"{directory.name} | {kl:.4f} / {answers_kl:.4f} | {times} | {plain['tokens_per_second']:.1f} | "
            f"{auto['tokens_per_second']:.1f} | {auto['acceptance_length']:.2f}"
        )
        found.append({"engine": directory.name, "pass_ms": by_width, "kl": kl, "answers_kl": answers_kl, **arms})
    first = found[0]
    for other in found[1:]:
        print(
            f"{other['engine']} / {first['engine']}: t(1) {other['pass_ms'][1] / first['pass_ms'][1]:.2f}, t(8) / t(1) "
            f"{other['pass_ms'][8] / other['pass_ms'][1]:.2f}, plain "
            f"{other['none']['tokens_per_second'] / first['none']['tokens_per_second']:.2f}, auto "
            f"{other['auto']['tokens_per_second'] / first['auto']['tokens_per_second']:.2f}"
        )
    print(f"{differing} answers differ from the plain ones")
    print(json.dumps({"engines": found, "differing": differing}))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
