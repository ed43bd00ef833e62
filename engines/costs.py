"""The price of a pass: milliseconds by rows in the cache and width, medians of interleaved runs."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.cache_rows import Float32
from engines.contract import Contract

CURVE_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
CURVE_ROWS = 256

_FILLED_AT_ONCE = 64

CostSurface = dict[int, dict[int, float]]


class TimedSession(Protocol):
    """What timing needs of a session."""

    contract: Contract

    def run(self, token_ids: NDArray[np.int64], cache_length: int, num_logits_rows: int, /) -> NDArray[np.int64]:
        """The target's tokens after the last rows."""

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None) -> Float32:
        """A copy of cache rows: float32 [layers, 2, G, rows, D]."""

    def write_rows(self, first: int, rows: Float32) -> None:
        """Overwrite cache rows of all layers."""


def surface_widths(contract: Contract) -> list[int]:
    """The widths of the curve, as far as a verify call goes."""
    return [width for width in CURVE_WIDTHS if width <= contract.max_width]


def surface_rows(contract: Contract) -> list[int]:
    """16, 256, 1024 and the longest context, as far as the cache goes."""
    longest = contract.max_length
    return sorted({rows for rows in (16, CURVE_ROWS, 1024) if rows <= longest} | {longest})


def measure(
    session: TimedSession,
    *,
    rows: Sequence[int],
    widths: Sequence[int] = CURVE_WIDTHS,
    repeats: int = 9,
    on_row: Callable[[], None] = lambda: None,
) -> CostSurface:
    """Rows → width → median milliseconds of a verify pass with every row's token asked for.

    Widths take turns, so that a slow moment of the machine does not fall on one of them.
    """
    return measure_interleaved([session], rows=rows, widths=widths, repeats=repeats, on_row=on_row)[0]


def fill_cache(session: TimedSession, rows: int) -> None:
    """Put random rows into the cache: memory that was never written is one page of zeros, and read far too fast."""
    random = np.random.default_rng(4)
    shape = session.read_rows(0, 1).shape
    for first in range(0, rows, _FILLED_AT_ONCE):
        count = min(_FILLED_AT_ONCE, rows - first)
        session.write_rows(first, random.standard_normal((*shape[:-2], count, shape[-1]), np.float32))


def measure_interleaved(
    sessions: Sequence[TimedSession],
    *,
    rows: Sequence[int],
    widths: Sequence[int] = CURVE_WIDTHS,
    repeats: int = 9,
    on_row: Callable[[], None] = lambda: None,
) -> list[CostSurface]:
    """As `measure`, for several sessions that take turns too: the way to compare them."""
    random = np.random.default_rng(3)
    tokens = random.integers(0, min(session.contract.vocab_size for session in sessions), max(widths))
    times: list[dict[int, dict[int, list[float]]]] = [
        {cached: {width: [] for width in widths} for cached in rows} for _ in sessions
    ]
    for session in sessions:
        fill_cache(session, max(rows))
    for cached in rows:
        for repeat in range(-2, repeats):  # two rounds warm up
            for width in widths:
                for session, taken in zip(sessions, times, strict=True):
                    start = time.perf_counter()
                    session.run(tokens[:width], cached, width)
                    elapsed = time.perf_counter() - start
                    if repeat >= 0:
                        taken[cached][width].append(elapsed)
        on_row()
    return [
        {
            cached: {width: round(1e3 * median(runs), 3) for width, runs in by_width.items()}
            for cached, by_width in taken.items()
        }
        for taken in times
    ]
