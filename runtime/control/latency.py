"""Latency of a pass on this machine: the engine's recorded surface, corrected by the passes that are made."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
# Latencies are worked out anew for every so many cached positions.
_LENGTH_STEP = 64
# Passes that a correction remembers, and how many the recorded surface itself counts for.
_MEMORY = 200.0
_SURFACE_WEIGHT = 8.0
# A pass that took so many times what was expected was interrupted: it counts as this much. No latency falls below so
# much of what was recorded.
_MOST_RATIO, _LEAST_RATIO = 2.0, 0.1
# Passes that the correction of shared ones remembers.
_SHARED_MEMORY = 20.0
# Shapes of shared passes whose linears' time is kept, a few hundred kilobytes. Further drafts are worked out for
# multiples of the step.
_MOST_KNOWN, _MOST_STEP = 128, 16
# Of a pass, whatever time it may take.
_MOST_POSITIONS = 1 << 16
# Rounds between two corrections.
_CORRECTED_EVERY = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """What a pass that sequences share costs, by which they decide whether to draft at all.

    `least`: the probability that a draft must exceed to bring more tokens per second; from 1 on none does.
    `token_seconds`: of the pass without drafts, by token that it brings.
    """

    least: float
    token_seconds: float


# Where no latencies are known.
NO_THRESHOLD = Threshold(least=0.0, token_seconds=0.0)


class LatencyModel:
    """Seconds of a round by cached length and width.

    The surface is interpolated in both; it never falls with the width, as noisy latencies may. The correction is a
    line over the width, fitted to seen / expected of the rounds so far (decayed least squares): a machine that is
    busy slows wide passes down more than narrow ones.
    """

    def __init__(self, surface_ms: Mapping[int, Mapping[int, float]], *, widest: int) -> None:
        """`surface_ms`: cached length → width → milliseconds (`MachineRecord.cost_surface_ms`)."""
        self._lengths = sorted(surface_ms)
        widths = np.arange(1, widest + 1)
        self._surface = np.stack([_curve(surface_ms[length], widths) for length in self._lengths]) / 1e3
        # Weighted sums over rounds of width w and seen / expected r: of 1, w, w², r and r·w. The surface counts as
        # rounds of ratio 1, at two widths.
        self._prior = [_SURFACE_WEIGHT * sum(part) / 2 for part in zip(*map(_terms, (1, min(widest, 8))), strict=True)]
        self._sums = [0.0] * 5
        self._correction = [1.0] * widest
        self._widest = widest
        # After the fewest cached positions, wider passes are known as well, and their slope goes on.
        shortest = surface_ms[self._lengths[0]]
        known = max(widest, *shortest)
        self._wide = _curve(shortest, np.arange(1, known + 1)) / 1e3
        few = min(known // 2, known - 1)
        self._slope = float(self._wide[-1] - self._wide[-1 - few]) / max(1, few)
        # (Positions, further ones at most) → seconds of the linears, and the fewest that each further one adds.
        self._ahead: dict[tuple[int, int], tuple[Float64, Float64]] = {}
        # Seen / expected of passes that sequences share, beside the correction of others.
        self._shared = 1.0
        self._corrections = 0
        # Step of cached length → seconds by width: as recorded, and corrected.
        self._recorded: dict[int, list[float]] = {}
        # The same step and a width → what `_attention` gives.
        self._attentions: dict[tuple[int, int], float] = {}
        self._known: dict[int, Latencies] = {}

    def of(self, cache_length: int) -> "Latencies":
        """Latencies of rounds after so many cached positions."""
        step = cache_length // _LENGTH_STEP
        latencies = self._known.get(step)
        if latencies is None:
            recorded = self._recorded.get(step)
            if recorded is None:
                recorded = self._recorded[step] = self._interpolated(step * _LENGTH_STEP + _LENGTH_STEP // 2)
            latencies = self._known[step] = Latencies([a * b for a, b in zip(recorded, self._correction, strict=True)])
        return latencies

    def correct(self, cache_length: int, width: int, seconds: float) -> None:
        """A round of this width after so many cached positions took so long."""
        expected = self.of(cache_length).seconds[width - 1]
        ratio = min(seconds / expected, _MOST_RATIO) * self._correction[width - 1]
        self._sums = [old * (1 - 1 / _MEMORY) + new for old, new in zip(self._sums, _terms(width, ratio), strict=True)]
        self._corrections += 1
        # A line over hundreds of rounds changes slowly.
        if self._corrections % _CORRECTED_EVERY == 0:
            self._correction = self._line()
            self._known.clear()

    def of_pass(self, parts: Sequence[tuple[int, int]], *, most: int) -> "Latencies":
        """Latencies of a pass that sequences share, by the number of drafts beyond what they feed anyway.

        The linears' time goes by the positions of all; what attention to a sequence's own cache takes is added.

        Args:
            parts: cached length and width of each sequence.
            most: further drafts, at most.
        """
        total, attention = self._sums_of(parts)
        each = attention / total if total else 0.0
        factor = self._correction_at(total) * self._shared
        linears, ahead = (part[: most + 1] for part in self._linears_ahead(total, -(-most // _MOST_STEP) * _MOST_STEP))
        seconds = factor * (linears + attention + each * np.arange(most + 1))
        least = factor * (ahead + each)
        least[-1] = math.inf
        return Latencies(seconds.tolist(), least.tolist())

    def seconds_of(self, parts: Sequence[tuple[int, int]]) -> float:
        """Seconds of a pass that sequences share, without further drafts: cached length and width of each."""
        total, attention = self._sums_of(parts)
        return self._correction_at(total) * self._shared * (self._linears(total) + attention)

    def threshold(
        self, parts: Sequence[tuple[int, int]], *, beside: Sequence[tuple[int, int]], most: int
    ) -> "Threshold":
        """What drafts cost beside rounds, prompts counted as in `of_rounds`; `most`: drafts, at most."""
        total, attention = self._sums_of(parts)
        seconds = self._correction_at(total) * self._shared * (self._linears(total) + attention)
        prompts, further = self._sums_of(beside)
        _, ahead = self._linears_ahead(total + prompts, -(-most // _MOST_STEP) * _MOST_STEP)
        least = float(ahead[0]) + (attention + further) / (total + prompts)
        least *= self._correction_at(total + prompts) * self._shared
        return Threshold(least=least * len(parts) / seconds, token_seconds=seconds / len(parts))

    def of_rounds(
        self, parts: Sequence[tuple[int, int]], *, beside: Sequence[tuple[int, int]], most: int
    ) -> "tuple[Latencies, float]":
        """What rounds add to a pass that feeds prompts as well, as `of_pass` has it; and the prompts' own seconds.

        Prompts have to be fed whatever is drafted. Were their time a round's, any draft would seem to pay
        beside a long chunk, and would delay the prompt for tokens that later passes bring in less time.

        Args:
            parts, beside: cached length and width of each sequence that decodes, and of each prompt.
            most: further drafts, at most.
        """
        both = self.of_pass([*beside, *parts], most=most)
        if not beside:
            return both, 0.0
        prompts = both.seconds[0] - self.seconds_of(parts)
        return Latencies([seconds - prompts for seconds in both.seconds], both.least_ahead), prompts

    def correct_pass(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        """A pass that sequences shared took so long."""
        expected = self.seconds_of(parts)
        ratio = min(max(seconds / expected, _LEAST_RATIO), _MOST_RATIO)
        self._shared *= 1 + (ratio - 1) / _SHARED_MEMORY

    def positions_within(self, seconds: float, *, cached: int = 0) -> int:
        """How many positions of one sequence a pass may hold to take so long after `cached` ones; 0 or more."""
        return bisect_right(
            range(1, _MOST_POSITIONS + 1), seconds, key=lambda positions: self.seconds_of([(cached, positions)])
        )

    def _linears_ahead(self, total: int, most: int) -> tuple[Float64, Float64]:
        """Seconds of the linears of `total` positions and 0 to `most` more, and `Latencies.least_ahead` of them."""
        known = self._ahead.get((total, most))
        if known is None:
            if len(self._ahead) > _MOST_KNOWN:
                self._ahead.clear()
            seconds = np.array([self._linears(total + count) for count in range(most + 1)])
            known = self._ahead[total, most] = (seconds, _least_ahead(seconds))
        return known

    def _linears(self, width: int) -> float:
        """Recorded seconds of a pass of this width after the fewest cached positions."""
        curve = self._wide
        if width <= len(curve):
            return float(curve[width - 1])
        # Beyond what was recorded, each position takes as long as the last ones did.
        return float(curve[-1] + self._slope * (width - len(curve)))

    def _sums_of(self, parts: Sequence[tuple[int, int]]) -> tuple[int, float]:
        """Positions of a pass, and the seconds of its attention."""
        total, attention = 0, 0.0
        for cached, width in parts:
            total += width
            attention += self._attention(cached, width)
        return total, attention

    def _attention(self, cached: int, width: int) -> float:
        """Recorded seconds that a sequence's cached positions add to a pass.

        Beyond the widths that were recorded after many positions, each further one adds as much as those before it.
        """
        if width > self._widest:
            return self._attention(cached, self._widest) * width / self._widest
        step = cached // _LENGTH_STEP
        attention = self._attentions.get((step, width))
        if attention is None:
            recorded = self._recorded.get(step)
            if recorded is None:
                recorded = self._recorded[step] = self._interpolated(step * _LENGTH_STEP + _LENGTH_STEP // 2)
            attention = self._attentions[step, width] = max(0.0, recorded[width - 1] - self._linears(width))
        return attention

    def _correction_at(self, width: int) -> float:
        return self._correction[min(width, self._widest) - 1]

    def _interpolated(self, cache_length: int) -> list[float]:
        if len(self._lengths) == 1:
            return [float(value) for value in self._surface[0]]
        place = min(max(bisect_left(self._lengths, cache_length), 1), len(self._lengths) - 1)
        low, high = self._lengths[place - 1], self._lengths[place]
        share = max((cache_length - low) / (high - low), 0.0)
        between = self._surface[place - 1] * (1 - share) + self._surface[place] * share
        if share > 1:
            # A longer context than was recorded takes longer by as much as the last ones did, at every width.
            between = np.maximum.accumulate(np.maximum(between, self._surface[place]))
        return [float(value) for value in between]

    def _line(self) -> list[float]:
        """Seen / expected by width."""
        count, w, ww, r, rw = (seen + prior for seen, prior in zip(self._sums, self._prior, strict=True))
        slope = (rw - w * r / count) / (ww - w * w / count)
        return [
            max(r / count + slope * (width - w / count), _LEAST_RATIO) for width in range(1, len(self._correction) + 1)
        ]


class Latencies:
    """Seconds of a round by the number of its drafts, 0 first.

    `least_ahead[n]`: the fewest seconds that each of any number of drafts after the n-th adds. A token less likely
    than that times the rate so far cannot raise it (`candidates.select`).
    """

    __slots__ = ("_padded", "least_ahead", "seconds")

    def __init__(self, seconds: list[float], least_ahead: list[float] | None = None) -> None:
        """`least_ahead`: where it is known already."""
        self.seconds = seconds
        self._padded: dict[int, Latencies] = {}
        self.least_ahead = _least_ahead(np.array(seconds)).tolist() if least_ahead is None else least_ahead

    def after(self, seconds: float) -> "Latencies":
        """The same where so much was spent before."""
        return Latencies([one + seconds for one in self.seconds], self.least_ahead) if seconds else self

    def padded(self, plain_width: int) -> "Latencies":
        """The same where narrower passes are made as wide as this."""
        if plain_width == 1:
            return self
        if plain_width not in self._padded:
            narrow = plain_width - 1
            self._padded[plain_width] = Latencies([self.seconds[narrow]] * narrow + self.seconds[narrow:])
        return self._padded[plain_width]


def _least_ahead(seconds: Float64) -> Float64:
    """Of each number of drafts, the fewest seconds that each of any number after it adds; after the last, infinity."""
    count = np.arange(len(seconds))
    steps = count[None] - count[:, None]
    rises = np.full((len(seconds), len(seconds)), math.inf)
    np.divide(seconds[None] - seconds[:, None], steps, out=rises, where=steps > 0)
    least: Float64 = rises.min(axis=1)
    return least


def _terms(width: float, ratio: float = 1.0) -> tuple[float, float, float, float, float]:
    return 1.0, width, width * width, ratio, ratio * width


def _curve(recorded: Mapping[int, float], widths: NDArray[np.int64]) -> Float64:
    """Milliseconds at every width: between two recorded ones a line, after the last one its slope, never falling."""
    known = sorted(recorded)
    values = np.maximum.accumulate([recorded[width] for width in known])
    curve = np.interp(widths, known, values)
    if len(known) > 1:
        slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
        curve = np.where(widths > known[-1], values[-1] + slope * (widths - known[-1]), curve)
    return curve
