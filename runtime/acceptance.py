"""Which drafts are accepted: the longest path from the pending token that the target chooses itself."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# A place in the pass (0: the pending token; i + 1: draft i) and the token that the target chose after it → the place
# of the draft that is this token, or None.
Follow = Callable[[int, int], int | None]


def follow(draft: Int64, parents: Int64 | None = None) -> Follow:
    """How to walk down a draft.

    `draft` int64 [K]; `parents` int64 [K] (runtime.drafters.Draft), or None for a chain.
    """
    tokens = draft.tolist()
    if parents is None:
        return lambda place, token: place + 1 if place < len(tokens) and tokens[place] == token else None
    places = {
        (parent + 1, token): place
        for place, (parent, token) in enumerate(zip(parents.tolist(), tokens, strict=True), 1)
    }
    return lambda place, token: places.get((place, token))


def accept(
    step: Follow, choose: Callable[[int], int], goes_on: Callable[[int], bool]
) -> tuple[tuple[int, ...], list[int], int]:
    """Walk from the pending token down the drafts that the target chooses, until it chooses another token.

    Args:
        step: from `follow`.
        choose: a place in the pass → the target's token after it; called in the order of the tokens.
        goes_on: told every token; False ends the sequence, and nothing is chosen after it.

    Returns the places after which tokens were chosen, these tokens, and how many of them are drafts: all but the last,
    which is the target's own, unless the sequence ended with a draft.
    """
    path: list[int] = []
    tokens: list[int] = []
    place: int | None = 0
    following: int | None = None
    while place is not None:
        token = choose(place)
        path.append(place)
        tokens.append(token)
        following = step(place, token)
        place = following if goes_on(token) else None
    return tuple(path), tokens, len(path) - (following is None)
