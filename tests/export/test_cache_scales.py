"""Scales of an INT8 cache hold for positions that no calibration text reaches."""

import numpy as np
import pytest

from export.cache_scales import largest_anywhere
from quasar.checkpoints.rope import cos_sin_tables, inverse_frequencies
from quasar.checkpoints.spec import Rope

HEAD, CONTEXT, SEEN = 32, 4096, 100


def rotated(key, rope, positions):
    """A key where it stands: float32 [n, D]."""
    cos, sin = cos_sin_tables(rope, HEAD, CONTEXT)
    half = cos.shape[1]
    one, other = key[:half], key[half : 2 * half]
    rows = np.repeat(key[None], len(positions), axis=0)
    rows[:, :half] = one * cos[positions] - other * sin[positions]
    rows[:, half : 2 * half] = other * cos[positions] + one * sin[positions]
    return rows


@pytest.mark.parametrize("rope", [Rope(theta=1e6), Rope(theta=1e4, rotary_size=16)])
def test_keys_stay_within_their_scales_at_every_position(rope):
    random = np.random.default_rng(0)
    for key in (np.eye(HEAD, dtype=np.float32)[1] * 100, *random.standard_normal((20, HEAD)).astype(np.float32)):
        everywhere = np.abs(rotated(key, rope, np.arange(CONTEXT))).max(axis=0)
        seen = np.abs(rotated(key, rope, np.arange(SEEN)))
        found = largest_anywhere(seen[None], rope, CONTEXT)[0].max(axis=0)
        assert (everywhere <= found * (1 + 1e-5) + 1e-6).all()
        # What is not rotated stays, and what turns slowly gains little.
        half = rope.rotated(HEAD) // 2
        np.testing.assert_array_equal(found[2 * half :], seen.max(axis=0)[2 * half :])
        assert (found[: 2 * half] <= np.tile(np.hypot(key[:half], key[half : 2 * half]), 2) * (1 + 1e-5)).all()


def test_what_texts_show_is_less_than_what_a_context_does():
    """A pair that turns by a radian in the context: its second channel has next to nothing in a hundred positions."""
    rope = Rope(theta=1e6)
    pair = int(np.argmin(np.abs(inverse_frequencies(rope, HEAD) * CONTEXT - 1)))
    key = np.eye(HEAD, dtype=np.float32)[pair] * 100
    seen, everywhere = (
        np.abs(rotated(key, rope, np.arange(length)))[:, HEAD // 2 + pair].max() for length in (SEEN, CONTEXT)
    )
    assert seen < 0.1 * everywhere
