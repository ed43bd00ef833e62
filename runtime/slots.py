"""Which sequence has which slot of the session's KV cache, and the positions of those that have none.

A sequence that gives its slot up is swapped out: its positions move to memory of their own, as raw bytes, and come back
bit for bit. A sequence that has ended leaves its positions where they are, until another one needs the slot: a prompt
that begins with the same tokens starts from a copy of them (`PrefixCache`).
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.cache_rows import CacheRows
from engines.session import Session
from runtime.kv_cache import PREFIX_STEP, KVCache

Int64 = NDArray[np.int64]

# Whose positions may serve another request's prompt: of requests with the same salt, of all, or of none.
PrefixCache = Literal["salted", "shared", "off"]
PREFIX_CACHES: tuple[PrefixCache, ...] = ("salted", "shared", "off")


class FollowingCache(Protocol):
    """Another cache, with a slot for each of the session's: of a draft head, of engines that draft.

    What it lacks costs drafts, no tokens.
    """

    def forget(self, slot: int) -> None:
        """The slot goes to a sequence that must not find there what was another's."""

    def copy(self, source: int, target: int, tokens: Int64) -> None:
        """What the slot `source` has of these tokens, int64 [n], serves the sequence in `target`."""


class ScheduledSequence:
    """A sequence and its cache, whose positions lie in a slot (`resident`) or are swapped out.

    Attributes:
        salt: whose positions may serve its prompts; None: nobody's (`PrefixCache`).
        outlives: it goes on after a generation, as a conversation does: its positions are kept.
        generating: from `Scheduler.begin` to `Scheduler.end`.
        released: its cache is gone for good.
    """

    def __init__(self, cache: KVCache, *, salt: str | None = None, outlives: bool = False) -> None:
        self.cache = cache
        self.salt, self.outlives = salt, outlives
        self.swapped_out: CacheRows | None = None
        # The slot that it was brought to last.
        self.home: _Slot | None = None
        self.generating = False
        self.released = False

    @property
    def resident(self) -> bool:
        """Whether its positions lie in a slot: a single assignment, of the slot's owner, says so."""
        return self.home is not None and self.home.owner is self


class _Slot:
    """One slot: who has it, else whose positions are left in it, and when it was last used."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.owner: ScheduledSequence | None = None
        self.left: ScheduledSequence | None = None
        self.used = 0

    @property
    def last(self) -> ScheduledSequence | None:
        """Whose positions lie here."""
        return self.left if self.owner is None else self.owner


def _serves(other: ScheduledSequence, sequence: ScheduledSequence) -> bool:
    """Whether one sequence's positions may serve another's prompt."""
    return sequence.salt is not None and other.salt == sequence.salt


class Slots:
    """Gives slots to sequences. Used by one thread at a time (`runtime.scheduler`)."""

    def __init__(self, session: Session, following: Sequence[FollowingCache] = ()) -> None:
        """`following`: what has a slot for each of the session's, and goes with it."""
        self._session, self._following = session, following
        self._slots = [_Slot(number) for number in range(session.num_slots)]
        self._uses = 0

    def bring(
        self,
        sequence: ScheduledSequence,
        may_leave: Callable[[ScheduledSequence], int | None] = lambda other: 0,
        *,
        prompt: Int64 | None = None,
    ) -> bool:
        """Make a sequence resident; False where every slot belongs to a sequence that stays.

        Args:
            may_leave: of a sequence that has a slot, how soon it may be swapped out, least first; None: it stays.
            prompt: int64 [n], of a sequence that begins: a slot whose positions serve it is best.
        """
        self._uses += 1
        if sequence.resident:
            self._slots[sequence.cache.slot].used = self._uses
            return True
        slot = self._free_slot(sequence, prompt) or self._vacated(may_leave)
        if slot is None:
            return False
        kept = 0
        serves = slot.left is not None and _serves(slot.left, sequence)
        if not serves:
            for cache in self._following:
                cache.forget(slot.number)
        if slot.left is not None and prompt is not None and serves:
            # Its own positions stay where they are; `copy_prefix` would find them gone.
            kept = slot.left.cache.common_prefix(prompt) // PREFIX_STEP * PREFIX_STEP
            if kept > sequence.cache.length:
                sequence.cache.truncate(0)
                sequence.swapped_out = None
        # In this order, an interrupt between any two lines leaves nobody with positions that are another one's.
        slot.left, slot.used = None, self._uses
        if sequence.swapped_out is not None:
            rows = sequence.swapped_out[..., : sequence.cache.length, :]
            self._session.write_rows(0, rows, slot=slot.number)
        sequence.cache.slot, sequence.home = slot.number, slot
        slot.owner = sequence
        if prompt is not None and kept > sequence.cache.length:
            sequence.cache.commit(prompt[:kept])
        sequence.swapped_out = None
        return True

    @property
    def owners(self) -> list[ScheduledSequence]:
        """The sequences that have a slot."""
        # Read once each: those who only look need not be the thread that gives slots.
        return [owner for slot in self._slots if (owner := slot.owner) is not None]

    def release(self, sequence: ScheduledSequence) -> None:
        """The sequence is needed no more; what it leaves in its slot may serve others."""
        self.leave(sequence)
        sequence.released = True

    def leave(self, sequence: ScheduledSequence) -> None:
        """The sequence's positions are needed no more; those in a slot may serve others."""
        sequence.swapped_out = None
        if sequence.resident:
            slot = self._slots[sequence.cache.slot]
            slot.owner, slot.left = None, sequence if sequence.salt is not None else None

    def copy_prefix(self, sequence: ScheduledSequence, prompt: Int64) -> int:
        """Give a resident sequence the longest beginning of its prompt that a slot has, where that is more than it has.

        `prompt` int64 [n] begins with what the sequence has; its last token is always fed.

        Returns how many positions were copied.
        """
        known = sequence.cache.length
        longest, best = known, None
        for slot in self._slots:
            other = slot.last
            if other is not None and other is not sequence and _serves(other, sequence):
                length = other.cache.common_prefix(prompt) // PREFIX_STEP * PREFIX_STEP
                if length > longest:
                    longest, best = length, slot
        if best is None:
            return 0
        self._uses += 1
        best.used = self._uses
        rows = self._session.read_rows(known, longest, slot=best.number)
        self._session.write_rows(known, rows, slot=sequence.cache.slot)
        for cache in self._following:
            cache.copy(best.number, sequence.cache.slot, prompt)
        sequence.cache.commit(prompt[known:longest])
        return longest - known

    def _free_slot(self, sequence: ScheduledSequence, prompt: Int64 | None) -> _Slot | None:
        """A slot that nobody has.

        One with nothing to serve others, latest used first, since its memory is there; else one of which most serves
        this very prompt; else the least recently used.
        """
        free = [slot for slot in self._slots if slot.owner is None]
        empty = [slot for slot in free if slot.left is None]
        if empty:
            return max(empty, key=lambda slot: slot.used)
        if prompt is not None:
            for slot in free:
                left = slot.left
                if left is not None and _serves(left, sequence):
                    common = left.cache.common_prefix(prompt)
                    if common >= PREFIX_STEP and 2 * common >= left.cache.length:
                        return slot
        return min(free, key=lambda slot: slot.used, default=None)

    def _vacated(self, may_leave: Callable[[ScheduledSequence], int | None]) -> _Slot | None:
        """The slot of the sequence that may be swapped out soonest; of several, the least recently used."""
        leaving = [
            (rank, slot.used, slot.number)
            for slot in self._slots
            if slot.owner is not None and (rank := may_leave(slot.owner)) is not None
        ]
        if not leaving:
            return None
        slot = self._slots[min(leaving)[2]]
        other = slot.owner
        assert other is not None
        other.swapped_out = self._session.read_rows(0, other.cache.length, slot=slot.number)
        slot.owner = None
        return slot
