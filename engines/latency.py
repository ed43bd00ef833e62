"""The latency of a pass: milliseconds by cached length and width, and how sessions compare."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from engines.noise import AGREEMENT, Noise, thread_times, waited_share
from engines.session import Session, fill_randomly

CURVE_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
CURVE_LENGTH = 256
# Of passes that sequences share, after the fewest cached positions alone: what the linears take.
SHARED_WIDTHS = (32, 64, 128)
# Rounds before those that count.
WARM_UP = 2

_FILLED_AT_ONCE = 64
# Of a cache that is filled to be timed: all of a long context may be more memory than whoever loads the engine has.
_MOST_FILLED_BYTES = 1 << 30
# Rounds of passes that are so wide: one of them takes as long as a round of the others.
_SHARED_ROUNDS = 3

# Cached length → width → milliseconds.
LatencySurface = dict[int, dict[int, float]]
# Width → seconds of every pass.
PassTimes = dict[int, list[float]]


def surface_widths(contract: Contract) -> list[int]:
    """The widths of the curve, as far as a verify call goes."""
    return [width for width in CURVE_WIDTHS if width <= contract.max_width]


def surface_lengths(contract: Contract) -> list[int]:
    """16, 256, 1024 and the longest context, as far as the cache and a gigabyte of it go; what lies beyond follows."""
    position_bytes = contract.cache_bytes // contract.capacity
    longest = min(contract.max_length, max(1024, _MOST_FILLED_BYTES // position_bytes))
    return sorted({length for length in (16, CURVE_LENGTH, 1024) if length <= longest} | {longest})


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Latencies, cached length → width → milliseconds, and how noisy the machine was while they were measured."""

    surface_ms: LatencySurface
    noise: Noise


def measure_latency(
    session: Session,
    *,
    lengths: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    least: int = 10,
    most: int = 200,
    seconds: float = 15.0,
    on_length: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    threads: Callable[[], Mapping[str, tuple[float, float]]] = thread_times,
) -> Latency:
    """Time verify passes that give every position's token, until the smallest times of two halves of the rounds agree.

    Where sequences share passes, wider ones are timed as well, after the fewest cached positions.

    Other work makes passes slower and never faster, so the latency is what both halves reached: the larger of their
    smallest times. Overwrites the cache.

    Args:
        lengths, widths: cached lengths and widths of the surface; None for those that the engine's controller needs.
        least, most: rounds for each cached length; a round is a pass of every width.
        seconds: no further round at a cached length after so long, agreed or not; `least` are always made.
        clock, threads: this machine's time, and its threads' (`noise.thread_times`).
    """
    lengths = surface_lengths(session.contract) if lengths is None else lengths
    widths = surface_widths(session.contract) if widths is None else widths
    tokens = _tokens([session], widths)
    fill_cache(session, max(lengths))
    surface: LatencySurface = {}
    spreads, agreed = [], True
    before = threads()
    for cached in lengths:
        start = clock()

        def goes_on(made: int, times: list[PassTimes], start: float = start) -> bool:
            may_end = made >= least and made % 2 == 0
            return made < most and not (may_end and (_agree(times[0]) or clock() - start > seconds))

        (runs,) = _time_passes([session], tokens, cached, widths, goes_on, clock)
        surface[cached] = {width: round(1e3 * max(_halves(times)), 3) for width, times in runs.items()}
        spreads += [median(times) / min(times) for times in runs.values()]
        agreed = agreed and _agree(runs)
        on_length()
    if session.max_sequences > 1:
        most = min(session.max_logits_rows, session.contract.max_length - lengths[0])
        wide = [width for width in SHARED_WIDTHS if max(widths) < width <= most]
        (runs,) = _time_passes([session], _tokens([session], wide), lengths[0], wide, _few_rounds, clock)
        surface[lengths[0]].update({width: round(1e3 * min(times), 3) for width, times in runs.items()})
    noise = Noise(agreed=agreed, spread=round(median(spreads), 3), waited=waited_share(before, threads()))
    return Latency(surface_ms=surface, noise=noise)


def measure_interleaved(
    sessions: Sequence[Session],
    *,
    lengths: Sequence[int],
    widths: Sequence[int] = CURVE_WIDTHS,
    repeats: int = 9,
    on_length: Callable[[], None] = lambda: None,
) -> list[LatencySurface]:
    """Median milliseconds of several sessions whose passes alternate: the way to compare them."""
    tokens = _tokens(sessions, widths)
    for session in sessions:
        fill_cache(session, max(lengths))
    surfaces: list[LatencySurface] = [{} for _ in sessions]
    for cached in lengths:
        taken = _time_passes(sessions, tokens, cached, widths, lambda made, _: made < repeats)
        for surface, times in zip(surfaces, taken, strict=True):
            surface[cached] = {width: round(1e3 * median(runs), 3) for width, runs in times.items()}
        on_length()
    return surfaces


def _time_passes(
    sessions: Sequence[Session],
    tokens: NDArray[np.int64],
    cached: int,
    widths: Sequence[int],
    goes_on: Callable[[int, list[PassTimes]], bool],
    clock: Callable[[], float] = time.perf_counter,
) -> list[PassTimes]:
    """Each session's times, in rounds of a pass of every width, while `goes_on` says so of the rounds made until now.

    Widths and sessions alternate, so that a slow moment of the machine does not fall on one of them. Rounds that warm
    up count from below zero.
    """
    times: list[PassTimes] = [{width: [] for width in widths} for _ in sessions]
    made = -WARM_UP
    while goes_on(made, times):
        for width in widths:
            for session, taken in zip(sessions, times, strict=True):
                began = clock()
                session.run(tokens[:width], cached, width)
                elapsed = clock() - began
                if made >= 0:
                    taken[width].append(elapsed)
        made += 1
    return times


def _few_rounds(made: int, times: list[PassTimes]) -> bool:  # noqa: ARG001 - the form of `_time_passes`
    return made < _SHARED_ROUNDS - WARM_UP


def better(one: Latency, other: Latency) -> Latency:
    """Of two measurements of one engine on one machine, the quiet one; of two noisy ones, the lower time of each."""
    if not (one.noise.noisy and other.noise.noisy):
        return one if other.noise.noisy else other
    lower: LatencySurface = {}
    for surface in (one.surface_ms, other.surface_ms):
        for length, by_width in surface.items():
            known = lower.setdefault(length, {})
            known |= {width: min(ms, known.get(width, ms)) for width, ms in by_width.items()}
    attempts = one.noise.attempts + other.noise.attempts
    return Latency(surface_ms=lower, noise=replace(other.noise, attempts=attempts))


def _halves(times: Sequence[float]) -> tuple[float, float]:
    """The smallest times of the even and of the odd rounds."""
    return min(times[::2]), min(times[1::2])


def _agree(runs: Mapping[int, Sequence[float]]) -> bool:
    return all(max(_halves(times)) <= AGREEMENT * min(_halves(times)) for times in runs.values())


def _tokens(sessions: Sequence[Session], widths: Sequence[int]) -> NDArray[np.int64]:
    vocab_size = min(session.contract.vocab_size for session in sessions)
    return np.random.default_rng(3).integers(0, vocab_size, max(widths, default=0))


def fill_cache(session: Session, length: int) -> None:
    """Fill the cache with random values: memory that was never written is one page of zeros, and read far too fast."""
    random = np.random.default_rng(4)
    for first in range(0, length, _FILLED_AT_ONCE):
        fill_randomly(session, random, first, min(_FILLED_AT_ONCE, length - first))
