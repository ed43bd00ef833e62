"""Write what every case gives into `generations.json`: `python -m tests.golden.record ENGINES`.

ENGINES holds an engine directory for each name in `ENGINES` below. Prompts whose tokens change under noise on the
logits are passed over: another CPU's last bits could change them, too.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from tests.golden.cases import CASES, REAL_PROMPTS, TINY_PROMPTS, Case

HERE = Path(__file__).parent
# Engine of a case → folder below ENGINES. The real model is built anew where the test runs: with `--alpha off`, since
# the search for smoothing factors ends elsewhere with another CPU, or another number of threads. Its noise is larger:
# the last bits of a layer flip roundings in the layers after it, and there are thirty.
ENGINES = {"old": "old", "old-stock": "old", "qwen3": "qwen3", "smollm2": "smollm2"}
NOISE = {"old": 0.005, "old-stock": 0.005, "qwen3": 0.005, "smollm2": 0.06}
_SEEDS = 6
_FEWEST = 5


def noise_of(size: float, seed: int) -> Any:
    """A processor that adds uniform noise in ±size, other for each context length."""

    def change(context: Any, logits: Any) -> Any:
        drawn = np.random.default_rng([seed, len(context)]).uniform(-size, size, len(logits))
        return (logits + drawn).astype(np.float32)

    return change


def run(engine: runtime.Engine, case: Case, prompts: Sequence[str], noise: Any = None) -> list[int]:
    """The tokens of a case."""
    return [int(token) for token in case.run(engine, noise, *prompts, **case.options)]


def stable(engine: runtime.Engine, case: Case) -> tuple[list[str], list[int]] | None:
    """The first prompts whose tokens no noise changes, with those tokens."""
    pool = REAL_PROMPTS if case.engine == "smollm2" else TINY_PROMPTS
    # Another beginning for every case: many prompts are seen.
    begin = CASES.index(case)
    for first in range(begin, begin + len(pool)):
        prompts = [pool[(first + place) % len(pool)] for place in range(case.prompts)]
        ids = run(engine, case, prompts)
        size = NOISE[case.engine]
        again = (run(engine, case, prompts, noise_of(size, seed)) for seed in range(_SEEDS))
        if len(ids) > _FEWEST and all(one == ids for one in again):
            return prompts, ids
    return None


def main(folder: Path) -> None:
    """Record all."""
    lines = []
    for name, place in ENGINES.items():
        engine = runtime.load(folder / place, kernels="stock" if name == "old-stock" else None)
        for case in (case for case in CASES if case.engine == name):
            found = stable(engine, case)
            if found is None:
                raise SystemExit(f"{case.name}: noise changes the tokens of every prompt; give it others")
            print(f"{case.name}: {len(found[1])} tokens", flush=True)
            lines.append(f'  "{case.name}": {json.dumps({"prompts": found[0], "token_ids": found[1]})}')
        engine.close()
    (HERE / "generations.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
