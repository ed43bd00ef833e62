"""A pass's inputs as they lie on the device."""

import numpy as np
import pytest

from engines.contract import Contract
from engines.cuda.inputs import Inputs, input_bytes
from engines.gpu.host_device import HostDevice, host_array
from engines.session import Positions
from quasar.errors import GenerationError

CONTRACT = Contract(num_layers=1, num_kv_heads=1, head_size=16, vocab_size=100, max_length=400, capacity=448)
MOST = 64


def of(tokens, cache_length, num_logits, parents=None, slot=0):
    parents = None if parents is None else np.array(parents)
    return Positions(
        tokens=np.asarray(tokens), cache_length=cache_length, num_logits=num_logits, slot=slot, parents=parents
    )


@pytest.fixture
def filled():
    """Fill and upload, then read the device's arrays."""
    device = HostDevice(1 << 20)
    inputs = Inputs(device, CONTRACT, MOST, 16)
    assert (1 << 20) - device.free_bytes == input_bytes(MOST, 32)

    def fill(*batch, tokens=None, rows=None):
        tokens = sum(len(one.tokens) for one in batch) if tokens is None else tokens
        tiles = inputs.fill(batch, tokens, sum(one.num_logits for one in batch) if rows is None else rows)
        inputs.upload(tokens)
        shapes = dict.fromkeys(inputs.addresses, (MOST,)) | {"ancestors": (MOST, 32), "tiles": (MOST, 2)}
        found = {name: host_array(inputs.addresses[name], shape, np.int32).copy() for name, shape in shapes.items()}
        return found | {"tiles of parts": tiles}

    return fill


def test_arrays_do_not_overlap():
    inputs = Inputs(HostDevice(), CONTRACT, 100, 16)
    ends = sorted(inputs.addresses.values())
    # 16 bytes are loaded at once, which must start at a multiple of 16.
    assert all(address % 256 == 0 for address in ends)
    assert min(np.diff(ends)) >= 4 * 100
    assert inputs.addresses["ancestors"] == ends[-1]
    assert ends[-1] - inputs.addresses["tiles"] >= 8 * 128
    assert input_bytes(100, 32) >= ends[-1] - ends[0] + 4 * 100 * 32


def test_a_chain(filled):
    found = filled(of([7, 8, 9], 70, 2))
    assert found["token_ids"][:3].tolist() == [7, 8, 9]
    assert found["positions"][:3].tolist() == found["destinations"][:3].tolist() == [70, 71, 72]
    # A chain's whole path lies in order: nothing is looked up.
    assert found["committed"][:3].tolist() == [71, 72, 73]
    assert found["logits_rows"][:2].tolist() == [1, 2]
    assert not found["slots"].any()
    assert found["tiles of parts"] == (1,)
    assert found["tiles"][:2].tolist() == [[0, 3], [0, 0]]


def test_a_tree(filled):
    # 0 ─ 1 ─ 3 ─ 4, and 0 ─ 2 ─ 5.
    found = filled(of(np.arange(10, 16), 70, 6, [-1, 0, 0, 1, 3, 2]))
    assert found["token_ids"][:6].tolist() == [*range(10, 16)]
    assert found["positions"][:6].tolist() == [70, 71, 71, 72, 73, 72]
    assert found["destinations"][:6].tolist() == [*range(70, 76)]
    assert found["committed"][:6].tolist() == [70] * 6
    assert found["ancestors"][4, :4].tolist() == [0, 1, 3, 4]
    assert found["ancestors"][5, :3].tolist() == [0, 2, 5]
    assert found["logits_rows"][:6].tolist() == [*range(6)]


def test_a_batch_is_one_row_of_its_sequences(filled):
    """A prompt's chunk that wants nothing, a tree, a token and a chain, each in its slot after its own length."""
    batch = [
        of(np.arange(20), 0, 0, slot=2),
        of([50, 51, 52], 9, 3, [-1, 0, 0], slot=0),
        of([60], 300, 1, slot=3),
        of([70, 71], 5, 1, slot=1),
    ]
    found = filled(*batch)
    assert found["token_ids"][:26].tolist() == [*range(20), 50, 51, 52, 60, 70, 71]
    assert found["slots"][:26].tolist() == [2] * 20 + [0] * 3 + [3] + [1] * 2
    assert found["destinations"][:26].tolist() == [*range(20), 9, 10, 11, 300, 5, 6]
    assert found["positions"][:26].tolist() == [*range(20), 9, 10, 10, 300, 5, 6]
    assert found["committed"][:26].tolist() == [*range(1, 21), 9, 9, 9, 301, 6, 7]
    assert found["ancestors"][20:23, :2].tolist() == [[0, 0], [0, 1], [0, 2]]
    assert found["logits_rows"][:5].tolist() == [20, 21, 22, 23, 25]
    assert found["tiles of parts"] == (5,)
    assert found["tiles"][:6].tolist() == [[0, 16], [16, 4], [20, 3], [23, 1], [24, 2], [0, 0]]
    # Each sequence's own part is what it is alone.
    for one, first in zip(batch, (0, 20, 23, 24), strict=True):
        own, alone = slice(first, first + len(one.tokens)), filled(one)
        for name in ("token_ids", "slots", "destinations", "positions", "committed"):
            assert found[name][own].tolist() == alone[name][: len(one.tokens)].tolist()


def test_what_fills_a_pass_up_goes_nowhere(filled):
    """Whatever lay there before."""
    filled(of(np.arange(64), 300, 64))
    found = filled(of([7], 70, 1, slot=3), of([8, 9], 5, 1, slot=1), tokens=40, rows=8)
    assert found["destinations"][:40].tolist() == [70, 5, 6] + [-1] * 37
    assert found["slots"][:40].tolist() == [3, 1, 1] + [0] * 37
    # The first position is there in any cache, and nothing else is looked at.
    assert not found["token_ids"][3:40].any()
    assert not found["positions"][3:40].any()
    assert found["committed"][3:40].tolist() == [1] * 37
    assert found["logits_rows"][:8].tolist() == [0, 2] + [0] * 6
    assert found["tiles of parts"] == (2, 0)
    assert found["tiles"][:3].tolist() == [[0, 1], [1, 2], [0, 0]]
    assert not found["tiles"][3:].any()


def test_a_pass_leaves_nothing_to_the_next(filled):
    """A long tree, then a short one and a chain: what a token's path is comes from the latest alone."""
    filled(of(np.arange(32), 5, 32, np.arange(-1, 31)))
    found = filled(of([1, 2, 3], 100, 1, [-1, -1, 1]))
    for token, path in enumerate(([0], [1], [1, 2])):
        depth = found["positions"][token] - found["committed"][token]
        assert depth == len(path) - 1
        assert found["ancestors"][token, : depth + 1].tolist() == path
    found = filled(of([1, 2], 6, 1))
    assert (found["positions"][:2] < found["committed"][:2]).all()


def test_as_many_tokens_as_there_is_room_for(filled):
    found = filled(of(np.arange(64), 3, 5))
    assert found["positions"].tolist() == [*range(3, 67)]
    assert found["logits_rows"][:5].tolist() == [59, 60, 61, 62, 63]


def test_trees_that_do_not_fit_are_refused(filled):
    with pytest.raises(GenerationError, match=r"parents are \[-1, 1\]; for 2 tokens"):
        filled(of([1], 0, 1), of([1, 2], 0, 1, [-1, 1], slot=1))
    with pytest.raises(GenerationError, match="a tree of 33 tokens was fed, but this engine has trees of up to 32"):
        filled(of([1], 0, 1), of(np.zeros(33, np.int64), 0, 1, np.arange(-1, 32), slot=1))
