"""What choosing tokens from logits adds to a round of width 6: greedy and sampled rounds, interleaved in one run.

    python benchmarks/sampling_cost.py build/smollm2-w8a8
    python benchmarks/sampling_cost.py --shape smollm2-151936

A round samples positions until one is not the draft, so three kinds are compared with the greedy one, which is the
same for each: `all` accepts every draft and samples six positions, `typical` accepts one draft and samples two (prompt
lookup has 0.6 accepted on average), `first` samples one. Medians of milliseconds. With --shape the engine has random
weights, whose logits are as flat as logits get: nothing can be left out early. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from random_engine import FILES, contract_of, write_graphs
from shapes import SHAPES

from engines import OnnxRuntimeOptions, load_engine
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.session import Session
from plugins.cpu.library import find_library
from plugins.cpu.sampler import NativeSampler
from runtime.acceptance import accept, follow
from runtime.generation_options import GenerationOptions
from runtime.sampling.chooser import GreedyChooser, LogitsChooser, TokenChooser, TokenSampler, reference_sampler
from runtime.sampling.processors import LogitsChanges
from runtime.segment import Segment
from runtime.verifier import Verifier

Int64 = NDArray[np.int64]

WIDTH = 6
_ACCEPTED = {"all": WIDTH - 1, "typical": 1, "first": 0}
_WARM_UP = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "every option": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "min_new_tokens": 200,
        "logit_bias": {5: 1.0, 7: -1.0},
    },
}


class Rounds:
    """Rounds of width 6 after a prompt of random tokens."""

    def __init__(self, session: Session, sampler: TokenSampler, cache_length: int) -> None:
        self._verifier, self._sampler, self._cache_length = Verifier(session), sampler, cache_length
        self._prompt = np.random.default_rng(0).integers(0, session.contract.vocab_size, cache_length + 1)
        self._verifier.prefill(self._prompt[:cache_length])

    def run(self, setting: str | None, draft: Int64) -> tuple[Int64, float]:
        """The tokens of a round, and its milliseconds; None is greedy."""
        chooser = self._chooser(setting)
        context = np.concatenate([self._prompt, draft, [0]])
        segment = Segment(
            tokens=context[self._cache_length : self._cache_length + WIDTH].copy(),
            cache_length=self._cache_length,
            num_logits=WIDTH,
            wants_logits=chooser.wants_logits,
        )
        length = len(self._prompt)
        start = time.perf_counter()
        [targets] = self._verifier.run([segment])

        def choose(place: int) -> int:
            nonlocal length
            context[length] = token = chooser.choose(targets, place, context[:length])
            length += 1
            return token

        _, tokens, _ = accept(follow(draft), choose, lambda token: True)
        return np.array(tokens, np.int64), 1000 * (time.perf_counter() - start)

    def drafts(self, setting: str | None) -> dict[str, Int64]:
        """Drafts of which all, one or none are accepted."""
        right = np.zeros(WIDTH - 1, np.int64)
        for _ in range(WIDTH - 1):
            tokens, _ms = self.run(setting, right)
            right[: len(tokens)] = tokens[: WIDTH - 1]
        wrong = (right + 1) % self._verifier.contract.vocab_size
        return {name: np.concatenate([right[:count], wrong[count:]]) for name, count in _ACCEPTED.items()}

    def _chooser(self, setting: str | None) -> TokenChooser:
        if setting is None:
            return GreedyChooser()
        options, words = GenerationOptions(**SETTINGS[setting]), self._verifier.contract.vocab_size
        changes = LogitsChanges(options, self._prompt, words, frozenset([2])) if options.changes_logits else None
        return LogitsChooser(options, changes, sampler=self._sampler, seed=1)


def measure(rounds: Rounds, repeats: int) -> Mapping[str, float]:
    """Name of a round → its median milliseconds, all interleaved."""
    arms = {
        f"{setting or 'greedy'}, {kind}": (setting, draft, _ACCEPTED[kind] + 1)
        for setting in (None, *SETTINGS)
        for kind, draft in rounds.drafts(setting).items()
    }
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + _WARM_UP):
        for name, (setting, draft, expected) in arms.items():
            tokens, ms = rounds.run(setting, draft)
            if len(tokens) != expected:
                raise SystemExit(f"{name}: {len(tokens)} tokens came, {expected} were expected")
            if repeat >= _WARM_UP:
                samples[name].append(ms)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("engine", nargs="?", type=Path, metavar="DIR")
    which.add_argument("--shape", choices=SHAPES, help="an engine of random weights, on native kernels")
    parser.add_argument("--rows", type=int, default=256, help="cached positions")
    parser.add_argument("--kernels", choices=["native", "stock"])
    parser.add_argument("--numpy", action="store_true", help="draw as without a compiled library")
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        if options.engine is not None:
            loaded = load_engine(options.engine, options=OnnxRuntimeOptions(kernels=options.kernels))
            session: Session = loaded.session
        else:
            spec, folder = SHAPES[options.shape], Path(name)
            contract = contract_of(spec, options.rows + 64)
            write_graphs(spec, contract, folder)
            library = find_library().path
            session = OnnxRuntimeSession(folder, folder / FILES.native_graph, contract, library=library)
        sampler = reference_sampler if options.numpy else NativeSampler(find_library().path).prepare
        ms = measure(Rounds(session, sampler, options.rows), options.repeats)
    words = session.contract.vocab_size
    print(f"{words} words, {options.rows} cached positions, rounds of width {WIDTH}")
    for name, value in ms.items():
        greedy = ms[f"greedy, {name.rpartition(', ')[2]}"]
        print(f"  {name:24} {value:6.2f} ms  {100 * (value / greedy - 1):+5.1f} %")
    print(json.dumps({"words": words, "rows": options.rows, "ms": ms}))


if __name__ == "__main__":
    main()
