"""The price of a pass: milliseconds by rows in the cache and width."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.cache_rows import Float32
from engines.contract import Contract
from engines.noise import AGREEMENT, Noise, thread_times, waited_share

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """LatencyModel, rows → width → milliseconds, and how noisy the machine was while they were measured."""

    surface_ms: CostSurface
    noise: Noise


def measure(
    session: TimedSession,
    *,
    rows: Sequence[int],
    widths: Sequence[int] = CURVE_WIDTHS,
    least: int = 10,
    most: int = 200,
    seconds: float = 15.0,
    on_row: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    threads: Callable[[], Mapping[str, tuple[float, float]]] = thread_times,
) -> Costs:
    """Time verify passes with every row's token asked for, until the smallest times of two halves of the rounds agree.

    Other work makes passes slower and never faster, so the price is what both halves reached: the larger of their
    smallest times. Widths take turns, so that a slow moment of the machine does not fall on one of them.

    Args:
        least, most: rounds for each number of rows; a round is a pass of every width.
        seconds: no further round for a number of rows after so long, be it agreed or not; `least` are always made.
        clock, threads: this machine's time, and its threads' (`noise.thread_times`).
    """
    tokens = _tokens([session], widths)
    fill_cache(session, max(rows))
    surface: CostSurface = {}
    spreads, agreed = [], True
    before = threads()
    for cached in rows:
        runs: dict[int, list[float]] = {width: [] for width in widths}
        start = clock()
        for made in range(-2, most):  # two rounds warm up
            if made >= least and made % 2 == 0 and (_agree(runs) or clock() - start > seconds):
                break
            for width in widths:
                began = clock()
                session.run(tokens[:width], cached, width)
                if made >= 0:
                    runs[width].append(clock() - began)
        surface[cached] = {width: round(1e3 * max(_halves(times)), 3) for width, times in runs.items()}
        spreads += [median(times) / min(times) for times in runs.values()]
        agreed = agreed and _agree(runs)
        on_row()
    noise = Noise(agreed=agreed, spread=round(median(spreads), 3), waited=waited_share(before, threads()))
    return Costs(surface_ms=surface, noise=noise)


def better(one: Costs, other: Costs) -> Costs:
    """Of two measurements of one engine on one machine, the quiet one; of two noisy ones, the lower price of each."""
    if one.noise.noisy != other.noise.noisy:
        return other if one.noise.noisy else one
    if not one.noise.noisy or {rows: by.keys() for rows, by in one.surface_ms.items()} != {
        rows: by.keys() for rows, by in other.surface_ms.items()
    }:
        return other
    lower = {
        rows: {width: min(ms, other.surface_ms[rows][width]) for width, ms in by_width.items()}
        for rows, by_width in one.surface_ms.items()
    }
    return Costs(surface_ms=lower, noise=other.noise)


def _halves(times: Sequence[float]) -> tuple[float, float]:
    """The smallest times of the even and of the odd rounds."""
    return min(times[::2]), min(times[1::2])


def _agree(runs: Mapping[int, Sequence[float]]) -> bool:
    return all(max(_halves(times)) <= AGREEMENT * min(_halves(times)) for times in runs.values())


def _tokens(sessions: Sequence[TimedSession], widths: Sequence[int]) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, min(session.contract.vocab_size for session in sessions), max(widths))


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
    """Median milliseconds of several sessions whose passes take turns: the way to compare them."""
    tokens = _tokens(sessions, widths)
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
