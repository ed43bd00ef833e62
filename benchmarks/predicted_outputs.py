"""Predicted outputs: edits of code files, with the file as it was as the prediction, against decoding without.

    python benchmarks/predicted_outputs.py ENGINE [--edits 6] [--json FILE]

Each edit is answered plainly, with `auto`, and with `auto` and the prediction, one after the other, in an order that
rotates from edit to edit. Speeds are those of decoding: tokens after the first per second of the rounds. What shares
the machine disturbs them: the ratios within an edit are what to look at. Exit code 1: an answer differs.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from file_edits import EDITS, FileEdit

import runtime
from runtime.option_keywords import OptionsDict

# Tokens that an answer may have beyond those of the file.
_MORE = 64
PLAIN, AUTO, PREDICTED = ARMS = ("plain", "auto", "prediction")


def measure(engine: runtime.Engine, edit: FileEdit, turn: int, *, cap: int) -> dict[str, Any]:
    """One edit in each arm; `turn` says which arm is first."""
    tokens = len(engine.encode(edit.source, chat_template=False))
    limit = min(tokens + _MORE, cap)
    options: dict[str, OptionsDict] = {
        PLAIN: {"max_new_tokens": limit, "drafter": "none"},
        AUTO: {"max_new_tokens": limit},
        PREDICTED: {"max_new_tokens": limit, "prediction": edit.source},
    }
    answers = {}
    for arm in (*ARMS[turn % 3 :], *ARMS[: turn % 3]):
        answers[arm] = engine.generate(edit.prompt, **options[arm])
    stats = {arm: answer.stats for arm, answer in answers.items()}
    speeds = {arm: one.tokens_per_second for arm, one in stats.items()}
    return {
        "file": edit.name,
        "instruction": edit.instruction,
        "file_tokens": tokens,
        "tokens": stats[PLAIN].tokens,
        "identical": len({answer.token_ids for answer in answers.values()}) == 1,
        "tokens_per_second": {arm: round(speed, 2) for arm, speed in speeds.items()},
        "over_plain": {arm: round(speeds[arm] / speeds[PLAIN], 3) for arm in (AUTO, PREDICTED)},
        "acceptance_length": {arm: round(stats[arm].acceptance_length, 2) for arm in (AUTO, PREDICTED)},
        "prediction_tokens": {
            "accepted": stats[PREDICTED].accepted_prediction_tokens,
            "rejected": stats[PREDICTED].rejected_prediction_tokens,
        },
        "draft_milliseconds_per_round": round(
            1e3 * stats[PREDICTED].draft_seconds / max(1, stats[PREDICTED].rounds), 3
        ),
    }


def main() -> int:
    """Run it; 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--edits", type=int, default=len(EDITS), metavar="N", help="only the first N")
    parser.add_argument("--cap", type=int, default=4096, metavar="N", help="tokens of an answer, at most")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = []
    with runtime.load(arguments.engine, threads=arguments.threads, max_sequences=1) as engine:
        engine.warmup()
        for turn, edit in enumerate(EDITS[: arguments.edits]):
            begun = time.perf_counter()
            one = measure(engine, edit, turn, cap=arguments.cap)
            found.append(one)
            ratios, length = one["over_plain"], one["acceptance_length"]
            print(
                f"{edit.name:14} {one['tokens']:4} tokens  {'identical' if one['identical'] else 'DIFFERS':9}  over "
                f"plain: auto {ratios[AUTO]:.2f}, prediction {ratios[PREDICTED]:.2f}  L {length[AUTO]:.2f}, "
                f"{length[PREDICTED]:.2f}  accepted {one['prediction_tokens']['accepted']}, rejected "
                f"{one['prediction_tokens']['rejected']}  ({time.perf_counter() - begun:.0f} s)",
                flush=True,
            )
    medians = {arm: statistics.median(one["over_plain"][arm] for one in found) for arm in (AUTO, PREDICTED)}
    identical = sum(one["identical"] for one in found)
    print(
        f"median over plain: auto {medians[AUTO]:.2f}, prediction {medians[PREDICTED]:.2f}; {identical} of "
        f"{len(found)} answers identical"
    )
    if arguments.json:
        result = {"engine": str(arguments.engine), "median_over_plain": medians, "edits": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if identical == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
