"""Memory and time of the suffix automaton, by kind of text; no engine is needed.

    python benchmarks/suffix_automaton.py
    python benchmarks/suffix_automaton.py --tokens 1000000 --reference-tokens 0 --texts zipf copies

Texts: `zipf` has the word frequencies of a language, ids drawn one by one from 49,152; `copies` repeats pieces of
itself, 8 tokens long on average, as dialogues and code do; `two` and `many` are uniform over 2 and 50,000 ids, `few
often` over as many ids as give each 40 successors at the end; `run` and `period` repeat 1 and 7 ids; `fibonacci` is the
Fibonacci word; `a b…b c` has the most states and transitions that there can be; `distinct` repeats nothing.

Bytes are those allocated, per token: at the end, and the most at any of 100 places after the first tenth. Microseconds
are CPU time of one thread: per token in pieces of 10,000, and per round of 4 tokens after the whole text, each with
one match and its first 8 successors. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.cpu.library import open_library
from plugins.cpu.suffix_automaton import Automaton, NativeSuffixAutomaton
from plugins.suffix_automaton import SuffixAutomaton

Int64 = NDArray[np.int64]

_VOCABULARY = 49_152
_PIECE = 10_000
_ROUNDS, _ROUND = 1000, 4


def zipf(count: int) -> Int64:
    """Ids with frequencies like 1, 1/2, 1/3 and so on."""
    weights = 1 / np.arange(1, _VOCABULARY + 1)
    return np.random.default_rng(0).choice(_VOCABULARY, count, p=weights / weights.sum())


def copies(count: int) -> Int64:
    """The same with up to two tokens of it between pieces that stood before."""
    random, text = np.random.default_rng(1), zipf(count)
    place = count // 100 + 1
    while place < count:
        begin, size = int(random.integers(place)), int(random.geometric(1 / 8))
        size = min(size, place - begin, count - place)
        text[place : place + size] = text[begin : begin + size]
        place += size + int(random.integers(3))
    return text


def fibonacci(count: int) -> Int64:
    """0 1 0 0 1 0 1 0 …: every word is the last one and the one before it."""
    before, word = np.array([1]), np.array([0])
    while len(word) < count:
        before, word = word, np.concatenate([word, before])
    return word[:count]


def uniform(count: int, words: int) -> Int64:
    """Ids that are equally likely."""
    return np.random.default_rng(2).integers(0, words, count)


TEXTS: dict[str, Callable[[int], Int64]] = {
    "zipf": zipf,
    "copies": copies,
    "two": lambda count: uniform(count, 2),
    "many": lambda count: uniform(count, 50_000),
    "few often": lambda count: uniform(count, count // 40 + 1),
    "run": lambda count: np.zeros(count, np.int64),
    "period": lambda count: np.arange(count) % 7,
    "fibonacci": fibonacci,
    "a b…b c": lambda count: np.minimum(np.arange(count), 1) + (np.arange(count) == count - 1),
    "distinct": lambda count: np.arange(count),
}


def measure(automaton: Automaton, text: Int64) -> dict[str, float]:
    """Bytes and microseconds of an empty automaton that is given a text."""
    watched = range(0, len(text), max(len(text) // 100, 1)) if isinstance(automaton, NativeSuffixAutomaton) else ()
    next_watched, most, seconds = iter(watched), 0.0, 0.0
    place = next(next_watched, len(text))
    for begin in range(0, len(text), _PIECE):
        piece = text[begin : begin + _PIECE]
        start = time.process_time()
        automaton.extend(piece)
        seconds += time.process_time() - start
        if begin >= max(place, len(text) // 10):
            most = max(most, automaton.nbytes / len(automaton))
            place = next((one for one in next_watched if one > begin), len(text))
    held = automaton.nbytes / len(automaton)
    start = time.process_time()
    for begin in range(0, min(_ROUNDS * _ROUND, len(text)), _ROUND):
        automaton.extend(text[begin : begin + _ROUND])
        automaton.successors(automaton.match()[0], 8)
    rounds = time.process_time() - start
    return {
        "tokens": len(text),
        "bytes": held,
        "most_bytes": max(most, held),
        "us": 1e6 * seconds / len(text),
        "round_us": 1e6 * rounds / _ROUNDS,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of each text, for the compiled automaton")
    parser.add_argument("--reference-tokens", type=int, default=200_000, help="for the reference; 0 leaves it out")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), metavar="TEXT", help=", ".join(TEXTS))
    options = parser.parse_args()

    path = open_library().path
    kinds: dict[str, tuple[int, Callable[[], Automaton]]] = {
        "native": (options.tokens, lambda: NativeSuffixAutomaton(path)),
        "reference": (options.reference_tokens, SuffixAutomaton),
    }
    results: dict[str, Any] = {}
    print(f"{'':9} {'text':10} {'tokens':>10} {'bytes/token':>11} {'at most':>8} {'us/token':>8} {'us/round':>8}")
    for kind, (tokens, make) in kinds.items():
        for name in options.texts if tokens else ():
            result = measure(make(), TEXTS[name](tokens))
            results[f"{kind}, {name}"] = result
            print(
                f"{kind:9} {name:10} {tokens:10,} {result['bytes']:11.2f} {result['most_bytes']:8.2f}"
                f" {result['us']:8.2f} {result['round_us']:8.1f}",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
