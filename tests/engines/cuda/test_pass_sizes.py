"""Sizes of passes, and the tiles in which attention goes over the cache."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.cuda.pass_sizes import splits_of_batch, stepped, stepped_tiles
from engines.cuda.tiles import tile_table
from engines.session import Positions
from plugins.gpu.packing import tiles_of
from plugins.gpu.variants import TILE_TOKENS

CHECKED = {"deadline": None, "database": None, "derandomize": True}


def test_steps_are_few_and_small():
    sizes = [stepped(count) for count in range(257)]
    assert sizes[0] == 0
    assert all(count <= size for count, size in enumerate(sizes))
    # Less than a linear's tile leaves empty anyway.
    assert all(tiles_of(size, TILE_TOKENS[-1]) == tiles_of(count, TILE_TOKENS[-1]) for count, size in enumerate(sizes))
    assert all(size - count < max(8, count / 4) for count, size in enumerate(sizes))
    assert len(set(sizes)) == 1 + 8 + 4 + 4
    assert all(stepped(size) == size for size in sizes)


@settings(max_examples=300, **CHECKED)
@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=20),
    more=st.integers(0, 40),
    reach=st.sampled_from([2, 8, 32]),
    tile=st.sampled_from([1, 4, 16, 64]),
)
def test_tiles_hold_every_token_once(widths, more, reach, tile):
    starts = np.cumsum([0, *widths])
    fed = int(starts[-1])
    table, tiles = tile_table(starts, fed + more, reach=reach, tile=tile)
    parts = -(-(fed + more) // reach)
    assert table.shape == (parts * reach, 2)
    assert len(tiles) == parts
    held = []
    for part in range(parts):
        own = table[part * reach : (part + 1) * reach]
        assert own[: tiles[part], 1].all()
        assert not own[tiles[part] :].any()
        for first, count in own[: tiles[part]].tolist():
            assert count <= tile
            assert part * reach <= first
            assert first + count <= (part + 1) * reach
            # Of one sequence.
            assert np.searchsorted(starts, first, "right") == np.searchsorted(starts, first + count - 1, "right")
            held += range(first, first + count)
    assert held == [*range(fed)]
    # With steps there are as many launched or more, and never more than the table has.
    wide = stepped_tiles(tiles, fed + more, reach)
    assert all(a <= b for a, b in zip(tiles, wide, strict=True))
    assert all(count <= min(reach, fed + more - part * reach) for part, count in enumerate(wide))


@pytest.mark.parametrize(
    ("cached", "width", "expected"), [(0, 1, 0), (94, 1, 0), (95, 1, 1), (400, 32, 2), (700, 1, 4), (10000, 1, 16)]
)
def test_splits_are_those_of_the_longest_path(cached, width, expected):
    """Rounded up to a power of two, as far as the cache goes."""
    batch = [
        Positions(tokens=np.zeros(width, np.int64), cache_length=cached, num_logits=1),
        Positions(tokens=np.zeros(3, np.int64), cache_length=0, num_logits=1, slot=1),
    ]
    assert splits_of_batch(batch, 32, 16) == expected
    assert splits_of_batch(batch[::-1], 32, 16) == expected
