"""The controller's constants: recorded generations replayed with other values, on either half of the prompts.

    python -m evaluation verify DIR --prompts FILE.jsonl --max-new-tokens 128 --record trace.jsonl
    python benchmarks/controller_constants.py --trace trace.jsonl --engine DIR

A line for every value: the expected speed-up (total over total) on the even half, where a value is chosen, and on the
odd one, where the choice is checked. Drafting time is left out, so that the figures repeat exactly.
"""

import argparse
from pathlib import Path
from typing import Any

from evaluation.replay import halves, simulate
from evaluation.replay_conditions import ReplayConditions
from evaluation.traces import read_trace
from runtime.control import controller, estimates
from runtime.drafters import named, recycling

# Module, name, values to try; the code's own value is tried as well.
_CONSTANTS: tuple[tuple[Any, str, tuple[Any, ...]], ...] = (
    (estimates, "_PRIOR_WEIGHT", (2.0, 32.0)),
    (estimates, "_OTHERS_WEIGHT", (3.0, 30.0, 1000.0)),
    (estimates, "_MOST_WEIGHT", (100.0, 2000.0)),
    (controller, "_LEAST_REACH", (4, 16, 31)),
    (named, "_SUFFIX_BRANCHES", (1, 3)),
    (named, "_RECYCLING_BRANCHES", (1, 2)),
    (recycling, "_DEEPEST", (1, 2, 5)),
)


def main() -> None:
    """Try every value alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--engine", type=Path)
    parser.add_argument("--costs", type=Path)
    arguments = parser.parse_args()
    vocab_size, generations = read_trace(arguments.trace)
    conditions = ReplayConditions.read(arguments.engine, arguments.costs, vocab_size)
    parts = halves(generations)

    def show(name: str) -> None:
        # Shapes of recycled trees are cached by size.
        recycling.tree_shape.cache_clear()
        found = [simulate(part, conditions, "auto", count_drafting=False)["speed_up"] for part in parts]
        print(f"{name:40s} even {found[0]:.3f}  odd {found[1]:.3f}", flush=True)

    show("as it is")
    for module, name, values in _CONSTANTS:
        own = getattr(module, name)
        for value in values:
            setattr(module, name, value)
            show(f"{name} = {value} (is {own})")
        setattr(module, name, own)


if __name__ == "__main__":
    main()
