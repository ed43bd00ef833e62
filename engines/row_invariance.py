"""The probe behind the promise: a row's bits must not depend on how many rows are fed with it, or on what they hold.

A chain of tokens is decoded at one width; then, at every cache length, every width is fed and each row is compared
bit for bit, logits and cached keys and values, with junk drafts behind the row and without.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract, spare_rows

Float32 = NDArray[np.float32]
# Every width up to 17, and some up to the widest verify call.
WIDTHS = (*range(1, 18), 20, 24, 28, 32)
# Plain decoding is padded to at most this width; wider, it would cost more than it saves.
_MAX_BASE = 16
_SEED = 20260


class ProbedSession(Protocol):
    """What the probe needs of a session."""

    contract: Contract
    caches: list[tuple[Float32, Float32]]

    def run_logits(self, token_ids: NDArray[np.int64], cache_length: int, num_logits_rows: int, /) -> Float32:
        """Logits float32 [rows, V] of the last rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Cache lengths from `first` to `last`, one by one, or only the listed ones among them."""

    first: int
    last: int
    only: frozenset[int] | None = None
    widths: tuple[int, ...] = WIDTHS

    @property
    def lengths(self) -> list[int]:
        """The cache lengths that are compared."""
        return [n for n in range(self.first, self.last + 1) if self.only is None or n in self.only]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInvariance:
    """What a probe found.

    `chain`: the smallest width from which on all widths agree, so the width that plain decoding must be fed with;
    None if there is none. `tree`: whether a path through a tree is exact; the stock kernels shift reductions, so no.
    """

    chain: int | None
    tree: bool = False


def full_sweeps(contract: Contract) -> tuple[list[Sweep], list[Sweep]]:
    """The build's sweeps: on the cut-down graph, and on the whole one."""
    margin = max(WIDTHS)
    last = contract.max_length - margin
    cut_down = [Sweep(first=1, last=max(1, min(160, last)))]
    around = [(254, 258), (510, 514), (last - 2, last)]
    whole = [Sweep(first=first, last=end) for first, end in around if first > 0 and end <= last]
    return cut_down, whole


def brief_sweeps(contract: Contract) -> tuple[list[Sweep], list[Sweep]]:
    """A few seconds' worth, for a machine that the engine was not built on: path changes of the known kernels."""
    last = max(1, min(160, contract.max_length - max(WIDTHS)))
    lengths = frozenset({1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 46, 47, 48, 49, 61, 62, 63, 64, 65, 127, 128, 129, 160})
    widths = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32)
    cut_down = [Sweep(first=1, last=last, only=lengths, widths=widths)]
    whole = [Sweep(first=256, last=256, widths=widths)] if contract.max_length >= 256 + max(WIDTHS) else []
    return cut_down, whole


def probe(
    parts: Iterable[tuple[ProbedSession, list[Sweep]]], on_length: Callable[[], None] = lambda: None
) -> RowInvariance:
    """The smallest width m such that every width ≥ m gives the bits of a chain decoded at width m."""
    work = [(session, sweep) for session, sweeps in parts for sweep in sweeps]
    for base in range(1, _MAX_BASE + 1):
        if all(_agrees(session, sweep, base, on_length) for session, sweep in work):
            return RowInvariance(chain=base)
    return RowInvariance(chain=None)


def _agrees(session: ProbedSession, sweep: Sweep, base: int, on_length: Callable[[], None]) -> bool:
    random = np.random.default_rng(_SEED)
    vocabulary, widest = session.contract.vocab_size, max(sweep.widths)
    end = sweep.last + widest
    tokens = random.integers(0, vocabulary, end + base)
    junk = random.integers(0, vocabulary, end + base)
    for pair in session.caches:
        for cache in pair:
            cache[:, :, : sweep.first] = random.standard_normal(cache[:, :, : sweep.first].shape, np.float32)
    reference = {}
    for position in range(sweep.first, end):
        fed = np.concatenate([tokens[position : position + 1], junk[position + 1 : position + base]])
        reference[position] = session.run_logits(fed, position, base)[0].copy()
    keys, values = session.caches[-1]
    expected = (keys[:, :, :end].copy(), values[:, :, :end].copy())
    saved = [tuple(cache[:, :, sweep.first : end].copy() for cache in pair) for pair in session.caches]

    for length in sweep.lengths:
        for width in sweep.widths:
            if width < base:
                continue
            # Half of the passes are real tokens alone; in the others junk drafts follow, behind every place in turn.
            real = width if (length + width) % 2 else 1 + (length * 7 + width) % width
            fed = np.concatenate([tokens[length : length + real], junk[length + real : length + width]])
            logits = session.run_logits(fed, length, width)
            same = all(_same_bits(logits[row], reference[length + row]) for row in range(real)) and all(
                _same_bits(cache[:, :, length : length + real], wanted[:, :, length : length + real])
                for cache, wanted in zip((keys, values), expected, strict=True)
            )
            written = width + spare_rows(session.contract.head_size, length + width)
            for pair, kept in zip(session.caches, saved, strict=True):
                for cache, rows in zip(pair, kept, strict=True):
                    back = rows[:, :, length - sweep.first :][:, :, :written]
                    cache[:, :, length : length + back.shape[2]] = back
            if not same:
                return False
        on_length()
    return True


def _same_bits(a: Float32, b: Float32) -> bool:
    return bool(np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)))
