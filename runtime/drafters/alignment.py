"""Where an answer stands in a text that it was predicted to resemble: a cursor that edits move on."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# The longest match that is looked for, and of a token's places in the prediction, how many before and after the cursor.
_LONGEST, _BEFORE, _AFTER = 16, 256, 768
# A place so far after the cursor is near. Matches of so many tokens there, or anywhere else, are where the answer goes
# on.
_NEAR, _SURE_NEAR, _SURE = 96, 4, 10
# Replacements are learned up to so many tokens, and so many of them.
_MOST_REPLACED, _MOST_EDITS = 8, 64
# A replacement of so many tokens by as many is what a difference is taken for at first; after that, for an insertion.
_MOST_GUESSED = 2
# The newest token's share in how well the answer follows, and what is believed at first.
_NEWEST, _AT_FIRST = 1 / 24, 0.9


class Relation(IntEnum):
    """How a place was found."""

    FOLLOWED = 0
    NEAR = 1
    ELSEWHERE = 2
    GUESSED = 3
    REPLACED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The answer may go on with prediction[position:]; its last `length` tokens are those before."""

    position: int
    length: int
    relation: Relation


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Tokens of the prediction, and those that the answer had in their place."""

    removed: tuple[int, ...]
    inserted: tuple[int, ...]


class Alignment:
    """Follows an answer, token by token, along a prediction int64 [n].

    While the answer follows, the cursor goes on with it. After a difference the longest suffix of the answer that
    stands in the prediction says where it may be: near the cursor and after it first, since edits keep the order. The
    cursor goes to a place once the match is long enough to be no accident. A short replacement is remembered: where
    the same tokens come again, the answer is expected to replace them again, until it does not.
    """

    def __init__(self, prediction: Int64) -> None:
        self._array, self._tokens = prediction, prediction.tolist()
        # Places of each token, in order.
        self._order = np.argsort(prediction, kind="stable")
        self._sorted = prediction[self._order]
        self._answer: list[int] = []
        self._cursor = self._run = 0
        # The answer's first token that is not the prediction's; None while it follows.
        self._differs_at: int | None = None
        # While it differs: where it may stand, the likeliest relation first.
        self._found: list[Place] = []
        # The replacement under way and how many of its tokens came.
        self._replacing: tuple[Edit, int] | None = None
        self._edits: dict[tuple[int, ...], Edit] = {}
        self._by_first: dict[int, list[Edit]] = {}
        # The share of the latest tokens that were as expected.
        self.recent = _AT_FIRST

    def push(self, token: int) -> None:
        """The answer's next token."""
        self._answer.append(token)
        if self._differs_at is None:
            expected = self._cursor < len(self._tokens) or self._replacing is not None
            follows = self._follow(token)
            if expected:
                self.recent += _NEWEST * (follows - self.recent)
            if follows:
                return
        self._search(token)

    def places(self) -> list[Place]:
        """Where the answer may go on, at most three places, none of them twice; empty at the prediction's end."""
        if self._differs_at is not None:
            return self._found
        return [Place(position=self._cursor, length=self._run, relation=Relation.FOLLOWED)]

    def ahead(self, place: Place, count: int) -> tuple[list[int], list[int], list[int]]:
        """At most `count` tokens from a place on, and for each which one of a replacement it is (-1: of none).

        Last where it stands in the prediction; a token of a replacement where what it replaces begins.
        """
        tokens: list[int] = []
        replacing: list[int] = []
        positions: list[int] = []
        position = place.position
        follows = place.relation is Relation.FOLLOWED
        edit, done = self._replacing if follows and self._replacing is not None else (None, 0)
        while len(tokens) < count:
            if edit is None:
                edit, done = self._edit_at(position), 0
            if edit is not None:
                part = edit.inserted[done : done + count - len(tokens)]
                tokens += part
                replacing += range(done, done + len(part))
                positions += [position] * len(part)
                position += len(edit.removed)
                edit = None
            elif position < len(self._tokens):
                tokens.append(self._tokens[position])
                replacing.append(-1)
                positions.append(position)
                position += 1
            else:
                break
        return tokens, replacing, positions

    def unedited(self, position: int, count: int) -> list[int]:
        """What the prediction has there, at most `count` tokens."""
        tokens: list[int] = self._tokens[position : position + count]
        return tokens

    def _follow(self, token: int) -> bool:
        """Go on with the answer, if this is the token that was expected, or the prediction's own."""
        under_way, self._replacing = self._replacing, None
        if under_way is None:
            edit = self._edit_at(self._cursor)
            if edit is not None:
                if edit.inserted[0] == token:
                    under_way = (edit, 0)
                elif self._tokens[self._cursor] == token:
                    # It was kept here: what was replaced before is not replaced everywhere.
                    self._forget(edit)
        if under_way is not None:
            edit, done = under_way
            if edit.inserted[done] != token:
                self._differs_at = len(self._answer) - 1 - done
                return False
            if done + 1 < len(edit.inserted):
                self._replacing = (edit, done + 1)
            else:
                self._cursor += len(edit.removed)
        elif self._cursor < len(self._tokens) and self._tokens[self._cursor] == token:
            self._cursor += 1
        else:
            self._differs_at = len(self._answer) - 1
            return False
        self._run += 1
        return True

    def _search(self, token: int) -> None:
        """After a difference: find where the answer may be, and go there where that is sure."""
        assert self._differs_at is not None
        near, elsewhere = self._matches(token)
        self._found = [place for place in (near, elsewhere) if place is not None]
        if near is not None and near.length >= _SURE_NEAR:
            self._go_to(near)
        elif elsewhere is not None and elsewhere.length >= _SURE:
            self._go_to(elsewhere)
        else:
            different = len(self._answer) - self._differs_at
            replaced = different <= _MOST_GUESSED and self._cursor > 0
            guess = self._cursor + (different if replaced else 0)
            if guess < len(self._tokens) and all(place.position != guess for place in self._found):
                self._found.append(Place(position=guess, length=0, relation=Relation.GUESSED))

    def _matches(self, token: int) -> tuple[Place | None, Place | None]:
        """The places of the longest matches near the cursor, and anywhere else; of several the nearest."""
        first, last = np.searchsorted(self._sorted, token, "left"), np.searchsorted(self._sorted, token, "right")
        after = self._order[first:last] + 1
        middle = int(np.searchsorted(after, self._cursor))
        after = after[max(0, middle - _BEFORE) : middle + _AFTER]
        after = after[after < len(self._tokens)]
        if not len(after):
            return None, None
        lengths = np.ones(len(after), np.int64)
        going = np.arange(len(after))
        for back in range(2, min(_LONGEST, len(self._answer)) + 1):
            starts = after[going] - back
            # An index below 0 would read the prediction's end.
            going = going[(starts >= 0) & (self._array[starts] == self._answer[-back])]
            if not len(going):
                break
            lengths[going] += 1
        distances = after - self._cursor
        is_near = (distances >= 0) & (distances <= _NEAR)
        # Longest first, then nearest.
        order = np.lexsort((np.abs(distances), -lengths))

        def best(which: NDArray[np.bool_], relation: Relation) -> Place | None:
            chosen = order[which[order]]
            if not len(chosen):
                return None
            return Place(position=int(after[chosen[0]]), length=int(lengths[chosen[0]]), relation=relation)

        return best(is_near, Relation.NEAR), best(~is_near, Relation.ELSEWHERE)

    def _go_to(self, place: Place) -> None:
        assert self._differs_at is not None
        answered = len(self._answer) - self._differs_at
        if place.relation is Relation.NEAR:
            # What is common to both after the difference is no part of the edit.
            common = min(place.length, answered, place.position - self._cursor)
            removed = tuple(self._tokens[self._cursor : place.position - common])
            inserted = tuple(self._answer[self._differs_at : len(self._answer) - common])
            if 0 < len(removed) <= _MOST_REPLACED and 0 < len(inserted) <= _MOST_REPLACED:
                self._remember(Edit(removed=removed, inserted=inserted))
        self._cursor, self._run = place.position, place.length
        self._differs_at, self._found = None, []

    def _edit_at(self, position: int) -> Edit | None:
        """The longest replacement of what stands there."""
        if position >= len(self._tokens):
            return None
        fitting = [
            edit
            for edit in self._by_first.get(self._tokens[position], ())
            if tuple(self._tokens[position : position + len(edit.removed)]) == edit.removed
        ]
        return max(fitting, key=lambda edit: len(edit.removed), default=None)

    def _remember(self, edit: Edit) -> None:
        if edit.removed in self._edits:
            self._forget(self._edits[edit.removed])
        elif len(self._edits) == _MOST_EDITS:
            self._forget(next(iter(self._edits.values())))
        self._edits[edit.removed] = edit
        self._by_first.setdefault(edit.removed[0], []).append(edit)

    def _forget(self, edit: Edit) -> None:
        del self._edits[edit.removed]
        self._by_first[edit.removed[0]].remove(edit)
