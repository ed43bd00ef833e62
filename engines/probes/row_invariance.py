"""The probe for row invariance: a position's bits must not depend on how many tokens are fed with it, or on which.

A chain of tokens is decoded at one width; then, at every cache length, every width is fed and each position is
compared bit for bit, output and cached keys and values, with junk drafts after it and without.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract, has_boundaries, spare_positions
from engines.session import Session, fill_randomly

# Every width up to 17, and some up to the widest verify call.
WIDTHS = (*range(1, 18), 20, 24, 28, 32)
# Those of them at which kernels are known to change their path.
BRIEF_WIDTHS = (1, 2, 3, 4, 5, 8, 9, 14, 15, 16, 17, 24, 32)
# Plain decoding is padded to at most this width; a wider one would be slower than what drafts save.
_MAX_BASE = 16
_ENOUGH_DRAFTS = 8
_SEED = 20260
_CUT_DOWN_LENGTHS = 160
# Positions and token sets of the second look for boundaries.
_REACH, _MORE_TOKEN_SETS = 8, 2
# Of a sample of lengths at which boundaries are looked for: a prime, so that no block size divides it.
_FIRST_BOUNDARIES, _BOUNDARY_STRIDE = 320, 61
# Boundaries are looked for in steps of so many lengths, as far as progress is concerned.
BOUNDARY_STEP = 64


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

    A position has the same bits at every width from `chain` to `widest`: plain decoding is fed at least `chain`, a
    verify call at most `widest`. `chain` None: no two widths agree.

    `boundaries`: totals (committed positions and new ones) at which attention changes its order of summation, as ONNX
    Runtime's does for head sizes above 128. A pass may not reach over one: see `drafts_before_boundary`.

    `tree`: whether a path through a tree is exact; the stock kernels shift reductions, so no.

    `prefill`: whether positions of a prefill chunk have those bits, too: then decoded positions serve a later prompt.

    `batch`: whether positions of several sequences that share a pass have those bits.
    """

    chain: int | None
    widest: int
    boundaries: tuple[int, ...] = ()
    tree: bool = False
    prefill: bool = False
    batch: bool = False

    def drafts_before_boundary(self, cache_length: int) -> int:
        """How many drafts a pass after `cache_length` positions can verify and stay on one side of every boundary.

        Plain decoding of the same tokens runs at totals from `cache_length + chain` on, one by one; none of them, and
        not the pass's own, may lie on the other side.
        """
        plain = cache_length + (self.chain or 1)
        place = bisect_right(self.boundaries, plain)
        return self.boundaries[place] - plain - 1 if place < len(self.boundaries) else self.widest


def full_sweeps(contract: Contract) -> tuple[list[Sweep], list[Sweep]]:
    """The build's sweeps: on the cut-down graph, and on the whole one."""
    margin = max(WIDTHS)
    last = contract.max_length - margin
    cut_down = [Sweep(first=1, last=max(1, min(_CUT_DOWN_LENGTHS, last)))]
    around = [(254, 258), (510, 514), (last - 2, last)]
    whole = [Sweep(first=first, last=end) for first, end in around if first > 0 and end <= last]
    return cut_down, whole


def brief_sweeps(contract: Contract) -> tuple[list[Sweep], list[Sweep]]:
    """A few seconds' worth, for a machine that the engine was not built on: path changes of the known kernels."""
    last = max(1, min(_CUT_DOWN_LENGTHS, contract.max_length - max(WIDTHS)))
    lengths = frozenset(
        {1, 2, 3, 7, 8, 15, 16, 33, 48, 61, 62, 63, 64, 65, 127, 128, 160, 175, 177, 185, 192, 255, 320}
    )
    cut_down = [Sweep(first=1, last=last, only=lengths, widths=BRIEF_WIDTHS)]
    whole = [Sweep(first=256, last=256, widths=BRIEF_WIDTHS)] if contract.max_length >= 256 + max(WIDTHS) else []
    return cut_down, whole


def find_row_invariance(
    cut_down: tuple[Session, Sequence[Sweep]],
    whole: tuple[Session, Sequence[Sweep]],
    on_length: Callable[[], None] = lambda: None,
    *,
    boundary_at: Sequence[int] | None = None,
) -> RowInvariance:
    """The range of widths whose positions agree with a chain that is decoded at the narrowest of them.

    The narrowest one is taken that leaves room for eight drafts, else the one that leaves room for most. Boundaries
    are looked for on the cut-down graph, which has the whole one's attention in a fraction of the time: after the
    cache lengths `boundary_at`, None for all.
    """
    best = RowInvariance(chain=None, widest=1)
    for base in range(1, _MAX_BASE + 1):
        lengths = boundary_lengths(cut_down[0].contract) if boundary_at is None else boundary_at
        boundaries = _find_boundaries(cut_down[0], base, lengths, on_length)
        if boundaries is None:
            continue
        widest = max(width for width in WIDTHS if width <= cut_down[0].contract.max_width)
        found = RowInvariance(chain=base, widest=widest, boundaries=boundaries)
        for session, sweeps in (cut_down, whole):
            for sweep in sweeps:
                found = replace(found, widest=_widest_exact(session, sweep, found, on_length))
        if found.widest - base > best.widest - (best.chain or 1):
            best = found
        if best.chain is not None and best.widest - best.chain >= _ENOUGH_DRAFTS:
            return best
    return best


def boundary_lengths(contract: Contract) -> range:
    """The cache lengths at which boundaries are looked for: all."""
    return range(1, contract.max_length - 1)


def sampled_boundary_lengths(contract: Contract, *, all_until: int = _FIRST_BOUNDARIES) -> list[int]:
    """Some of them, for kernels that are known to have none: all up to `all_until`, then every 61st, and the last."""
    lengths = boundary_lengths(contract)
    return [*lengths[:all_until], *lengths[all_until:-1:_BOUNDARY_STRIDE], *lengths[-1:]]


def _find_boundaries(
    session: Session, base: int, lengths: Sequence[int], on_length: Callable[[], None]
) -> tuple[int, ...] | None:
    """Totals at which one more token changes a position's bits; None if that is the rule and not the exception."""
    random = np.random.default_rng(_SEED)
    tokens = random.integers(0, session.contract.vocab_size, session.contract.max_length + base + 2)
    boundaries: list[int] = []
    for length in lengths:
        narrow = session.run_logits(tokens[length - 1 : length - 1 + base], length, base)[0].copy()
        wider = session.run_logits(tokens[length - 1 : length + base], length, base + 1)[0]
        if not _same_bits(narrow, wider):
            boundaries.append(length + base + 1)
            # More often than every sixteenth total: no boundary, the widths simply differ.
            if len(boundaries) > 8 + length // 16:
                return None
        if length % BOUNDARY_STEP == 0:
            on_length()
    if has_boundaries(session.contract.head_size):
        boundaries += _seen_from_afar(session, base, lengths)
    return tuple(sorted(set(boundaries)))


def _seen_from_afar(session: Session, base: int, lengths: Sequence[int]) -> list[int]:
    """Totals at which a position's bits change, from passes that reach over them from several lengths.

    One more token shows a boundary from one length alone, and rounding of activations may hide it there: passes that
    are eight tokens wider, with two token sets, look at every total sixteen times more.
    """
    found: list[int] = []
    contract = session.contract
    for seed in range(1, 1 + _MORE_TOKEN_SETS):
        tokens = np.random.default_rng(_SEED + seed).integers(0, contract.vocab_size, contract.max_length)
        for length in lengths:
            widest = min(base + _REACH, contract.max_width, contract.max_length - length)
            if widest <= base:
                continue
            wide = session.run_logits(tokens[length : length + widest], length, widest)[0].copy()
            narrow = session.run_logits(tokens[length : length + base], length, base)[0].copy()
            if _same_bits(narrow, wide):
                continue
            # The narrowest pass that differs reaches just over it.
            for width in range(base + 1, widest + 1):
                wider = session.run_logits(tokens[length : length + width], length, width)[0]
                if not _same_bits(narrow, wider):
                    found.append(length + width)
                    break
    return found


def _widest_exact(session: Session, sweep: Sweep, found: RowInvariance, on_length: Callable[[], None]) -> int:
    """The largest probed width up to which every position has the bits of the chain decoded at `found.chain`."""
    base, widest = found.chain or 1, found.widest
    random = np.random.default_rng(_SEED)
    vocabulary, margin = session.contract.vocab_size, max(sweep.widths)
    end = sweep.last + margin
    tokens = random.integers(0, vocabulary, end + base)
    junk = random.integers(0, vocabulary, end + base)
    fill_randomly(session, random, 0, sweep.first)
    reference = {}
    for position in range(sweep.first, end):
        fed = np.concatenate([tokens[position : position + 1], junk[position + 1 : position + base]])
        reference[position] = session.run_logits(fed, position, base)[0].copy()
    last = session.num_layers - 1
    saved = session.read_rows(sweep.first, end)

    for length in sweep.lengths:
        for width in sweep.widths:
            if not base <= width <= widest or width - 1 > found.drafts_before_boundary(length):
                continue
            # Half of the passes are real tokens alone; in the others junk drafts follow, after each place by turns.
            real = width if (length + width) % 2 else 1 + (length * 7 + width) % width
            fed = np.concatenate([tokens[length : length + real], junk[length + real : length + width]])
            outputs = session.run_logits(fed, length, width)
            written = width + spare_positions(session.contract.head_size, length + width)
            before = saved[..., length - sweep.first :, :][..., :written, :]
            same = all(_same_bits(outputs[index], reference[length + index]) for index in range(real)) and _same_bits(
                session.read_rows(length, length + real, [last])[0], before[-1][..., :real, :]
            )
            session.write_rows(length, before)
            if not same:
                widest = max((narrower for narrower in WIDTHS if narrower < width), default=0)
                break
        if widest < base:
            return widest
        on_length()
    return widest


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.tobytes() == b.tobytes()
