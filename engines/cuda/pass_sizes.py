"""How large a pass is: what its launches depend on, and with them the graph that replays it.

One sequence alone has exact sizes. Where sequences share passes there would be a graph for every mixture: their sizes
are rounded up in steps, so that few graphs serve them all. What fills a step up writes nothing that anyone reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engines.session import Positions
from plugins.gpu.variants import num_splits, power_of_2

# The least step of tokens and rows; further on, an eighth of the next power of two.
_STEP, _STEPS_TO_DOUBLE = 8, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSizes:
    """What a recorded pass depends on.

    `tokens` fed; `rows` whose tokens are wanted, 0: none is; `splits`: of the committed cache, as many as the longest
    path of the pass has or more; `tiles` of `attend_cache`, in each part of the pass; `logits`: whether they are
    written.
    """

    tokens: int
    rows: int
    splits: int
    tiles: tuple[int, ...]
    logits: bool


def stepped(count: int) -> int:
    """So many or a few more: a multiple of 8, above 64 of an eighth of the next power of two. 0 stays."""
    step = max(_STEP, power_of_2(count) // _STEPS_TO_DOUBLE)
    return -(-count // step) * step


def stepped_tiles(tiles: Sequence[int], tokens: int, reach: int) -> tuple[int, ...]:
    """The next power of two of the most tiles in any part of `reach` tokens; a part has no more tiles than tokens."""
    most = power_of_2(max(tiles))
    return tuple(min(most, reach, tokens - first) for first in range(0, tokens, reach))


def splits_of_batch(batch: Sequence[Positions], reach: int, most_splits: int) -> int:
    """Splits of the longest path, or the next power of two: one graph serves all lengths up to it."""
    splits = num_splits(max(one.cache_length + len(one.tokens) for one in batch) - 1, reach)
    # Programs beyond a path's end do nothing.
    return min(power_of_2(splits), most_splits) if splits else 0
