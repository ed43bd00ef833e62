"""The probe for prefix reuse says yes where decoded positions have a prefill's bits, and no where one bit differs."""

from dataclasses import replace

import numpy as np
import pytest

from engines.contract import Contract, capacity_for
from engines.probes.prefill_invariance import prefill_is_exact
from engines.probes.row_invariance import RowInvariance

CHAIN = RowInvariance(chain=1, widest=32)


class Exact:
    """Positions of the cache are tokens; a position's output is the sum of those up to itself."""

    num_layers = 1
    max_logits_rows = 256

    def __init__(self):
        self.contract = Contract(
            num_layers=1,
            num_kv_heads=1,
            head_size=1,
            vocab_size=50,
            max_length=200,
            capacity=capacity_for(200),
            prefill_chunk=64,
        )
        self.rows = np.zeros((1, 2, 1, self.contract.capacity, 1), np.float32)

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        end = cache_length + len(token_ids)
        self.rows[..., cache_length:end, 0] = token_ids
        sums = self.rows[0, 0, 0, :, 0].astype(np.float64).cumsum()[end - num_logits_rows : end]
        return sums.astype(np.float32)[:, None]

    def read_rows(self, first, end, layers=None, *, slot=0):
        return self.rows[..., first:end, :].copy()

    def write_rows(self, first, rows, *, slot=0):
        self.rows[..., first : first + rows.shape[-2], :] = rows


class OtherOutput(Exact):
    """A wide pass after a full chunk has a last bit of its own at one position."""

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        rows = super().run_logits(token_ids, cache_length, num_logits_rows)
        if len(token_ids) > 32 and cache_length:
            rows[17] = np.nextafter(rows[17], np.float32(np.inf))
        return rows


class OtherRows(Exact):
    """A wide pass into an empty cache writes one position a bit differently."""

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        rows = super().run_logits(token_ids, cache_length, num_logits_rows)
        if len(token_ids) > 32 and not cache_length:
            self.rows[0, 1, 0, 40, 0] += 1
        return rows


def test_exact_positions():
    assert prefill_is_exact(Exact(), CHAIN)
    assert prefill_is_exact(Exact(), RowInvariance(chain=1, widest=20))


def test_not_where_one_position_has_other_bits_than_several():
    """A prompt's last chunk may be one position: of 257 tokens, or after 256 that are reused."""
    assert not prefill_is_exact(Exact(), RowInvariance(chain=2, widest=32))


class OtherWidth(Exact):
    """Wider than a verify call may be here, and narrower than those that are compared as a rule."""

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        return super().run_logits(token_ids, cache_length, num_logits_rows) + (len(token_ids) == 25)


def test_widths_beyond_the_widest_verify_call():
    assert prefill_is_exact(OtherWidth(), CHAIN)
    assert not prefill_is_exact(OtherWidth(), RowInvariance(chain=1, widest=20))


class OtherNarrow(Exact):
    """The last chunk of a prompt, of 50 tokens, has bits of its own."""

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        rows = super().run_logits(token_ids, cache_length, num_logits_rows)
        if len(token_ids) == 50:
            self.rows[0, 0, 0, 3, 0] += 1
        return rows


class OtherFarAway(Exact):
    """Only the last chunk that fits differs."""

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        rows = super().run_logits(token_ids, cache_length, num_logits_rows)
        return rows + 1 if cache_length == 128 and len(token_ids) > 32 else rows


@pytest.mark.parametrize("session", [OtherOutput, OtherRows, OtherNarrow, OtherFarAway])
def test_one_other_bit(session):
    assert not prefill_is_exact(session(), CHAIN)


class OtherSecond(Exact):
    """Cached rows of position 40 of the second chunk differ."""

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        rows = super().run_logits(token_ids, cache_length, num_logits_rows)
        if len(token_ids) > 32 and cache_length == self.contract.prefill_chunk:
            self.rows[0, 1, 0, cache_length + 40, 0] += 1
        return rows


def test_only_so_many_positions():
    """Of one chunk, after another one."""
    assert prefill_is_exact(OtherSecond(), CHAIN, positions=32)
    assert not prefill_is_exact(OtherSecond(), CHAIN, positions=41)


def test_not_where_a_chunk_cannot_be_seen():
    short, narrow = Exact(), Exact()
    short.contract = replace(short.contract, max_length=50)
    narrow.max_logits_rows = 32
    assert not prefill_is_exact(short, CHAIN)
    assert not prefill_is_exact(narrow, CHAIN)


def test_not_where_chains_are_not_exact_or_have_boundaries():
    assert not prefill_is_exact(Exact(), RowInvariance(chain=None, widest=1))
    assert not prefill_is_exact(Exact(), RowInvariance(chain=1, widest=32, boundaries=(100,)))
