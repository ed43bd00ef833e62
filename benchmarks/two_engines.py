"""How much a second engine slows the first one down: with one shared thread pool, and with one pool each.

    python benchmarks/two_engines.py DIR OTHER
    python benchmarks/two_engines.py DIR OTHER --own-pools

Passes of the first engine, width 4 after 256 cached positions: with the second engine not loaded, loaded and idle, and
making a pass before each. Medians, milliseconds; arms repeat, so that a drift of the machine shows.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

import runtime
from engines.latency import fill_cache
from engines.loading import load_engine
from engines.session import Session

_CACHED, _WIDTH = 256, 4


def passes(session: Session, repeats: int, other: Session | None = None) -> float:
    """Median milliseconds of a pass; `other` makes one before each."""
    tokens = np.arange(_WIDTH)
    taken = []
    for repeat in range(repeats + 5):
        if other is not None:
            other.run(tokens, _CACHED, _WIDTH)
        start = time.perf_counter()
        session.run(tokens, _CACHED, _WIDTH)
        if repeat >= 5:
            taken.append(time.perf_counter() - start)
    return 1e3 * median(taken)


def main() -> None:
    """Measure the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--own-pools", action="store_true")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    if not arguments.own_pools:
        runtime.share_threads()
    session = load_engine(arguments.directory).session
    fill_cache(session, _CACHED)
    alone = passes(session, arguments.repeats)
    other = load_engine(arguments.other).session
    fill_cache(other, _CACHED)
    print(f"alone {alone:.2f}")
    for _ in range(3):
        idle, alternating = passes(session, arguments.repeats), passes(session, arguments.repeats, other)
        print(f"the other idle {idle:.2f}, alternating {alternating:.2f}")
    other.close()
    print(f"alone again {passes(session, arguments.repeats):.2f}")


if __name__ == "__main__":
    main()
