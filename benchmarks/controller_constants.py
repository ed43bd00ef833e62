"""The controller's constants: recorded generations replayed with other values, on either half of the prompts.

    python -m evaluation verify DIR --prompts FILE.jsonl --max-new-tokens 128 --record trace.jsonl
    python benchmarks/controller_constants.py --trace trace.jsonl --engine DIR
    python benchmarks/controller_constants.py --trace trace.jsonl --engine DIR --head-step-ms 0.58

A line for every value: the expected speed-up (total over total) on the even half, where a value is chosen, and on the
odd one, where the choice is checked. Drafting time is left out, so that the figures repeat exactly. With
`--head-step-ms`, what a step of the engine's draft head takes, it drafts as well, and its constants are tried.
"""

import argparse
from pathlib import Path
from typing import Any

from evaluation.replay import halves, simulate
from evaluation.replay_conditions import ReplayConditions
from evaluation.replay_head import ReplayedHead
from evaluation.traces import read_trace
from runtime.control import controller, estimates, growth
from runtime.drafters import draft_head, head_tree, named, recycling
from runtime.traces import TracedGeneration

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
_OF_HEADS: tuple[tuple[Any, str, tuple[Any, ...]], ...] = (
    (draft_head, "_MOST_EXPANDED", (1, 2, 8)),
    (draft_head, "_LEAST_RATIO", (0.25, 0.8)),
    (growth, "_LEAST_REACHED", (0.005, 0.08)),
    (growth, "_MOST_DEPTH", (4, 6)),
    (growth, "_MOST_STEPS", (3, 6)),
    (growth, "_FIRST_CHILD", (0.4, 0.8)),
    (growth, "_PATIENCE", (4, 64)),
    (head_tree, "_LEAST_SHARE", (0.001, 0.03)),
    (estimates, "_PRIOR_WEIGHT", (2.0, 32.0)),
)


def main() -> None:
    """Try every value alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--engine", type=Path)
    parser.add_argument("--costs", type=Path)
    parser.add_argument("--head-step-ms", type=float)
    arguments = parser.parse_args()
    vocab_size, generations = read_trace(arguments.trace)
    step_ms = arguments.head_step_ms
    conditions = ReplayConditions.read(
        arguments.engine, arguments.costs, vocab_size, with_head=step_ms is not None, head_step_ms=step_ms
    )
    if conditions.head is not None:
        _read_once(conditions.head)
    parts = halves(generations)

    def show(name: str) -> None:
        # Shapes of recycled trees are cached by size.
        recycling.tree_shape.cache_clear()
        found = [simulate(part, conditions, "auto", count_drafting=False)["speed_up"] for part in parts]
        print(f"{name:40s} even {found[0]:.3f}  odd {found[1]:.3f}", flush=True)

    show("as it is")
    for module, name, values in _CONSTANTS if step_ms is None else _OF_HEADS:
        own = getattr(module, name)
        for value in values:
            setattr(module, name, value)
            show(f"{name} = {value} (is {own})")
        setattr(module, name, own)


def _read_once(head: ReplayedHead) -> None:
    """Hidden states are the same for every value: the verifier runs over a generation once."""
    known: dict[int, Any] = {}
    read = head.hidden_states

    def hidden_states(generation: TracedGeneration) -> Any:
        if id(generation) not in known:
            known[id(generation)] = [states.copy() for states in read(generation)]
        return known[id(generation)]

    head.hidden_states = hidden_states  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
