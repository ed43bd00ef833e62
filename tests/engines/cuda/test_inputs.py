"""A pass's inputs as they lie on the device."""

import numpy as np
import pytest

from engines.cuda.inputs import Inputs, input_bytes
from engines.gpu.host_device import HostDevice, host_array


@pytest.fixture
def filled():
    """Fill and upload, then read the device's arrays."""
    device = HostDevice(1 << 20)
    inputs = Inputs(device, 64, 32)
    assert (1 << 20) - device.free_bytes == input_bytes(64, 32)

    def fill(*arguments):
        inputs.fill(*arguments)
        inputs.upload()
        shapes = dict.fromkeys(inputs.addresses, (64,)) | {"ancestors": (32, 32)}
        return {name: host_array(inputs.addresses[name], shape, np.int32).copy() for name, shape in shapes.items()}

    return fill


def test_arrays_do_not_overlap():
    inputs = Inputs(HostDevice(), 100, 32)
    ends = sorted(inputs.addresses.values())
    # 16 bytes are loaded at once, which must start at a multiple of 16.
    assert all(address % 256 == 0 for address in ends)
    assert min(np.diff(ends)) >= 4 * 100
    assert input_bytes(100, 32) >= ends[-1] - ends[0] + 4 * 32 * 32


def test_a_chain(filled):
    found = filled([7, 8, 9], 70, 2, None)
    assert found["token_ids"][:3].tolist() == [7, 8, 9]
    assert found["positions"][:3].tolist() == found["destinations"][:3].tolist() == [70, 71, 72]
    # A chain's whole path lies in order: nothing is looked up.
    assert found["committed"][:3].tolist() == [71, 72, 73]
    assert found["logits_rows"][:2].tolist() == [1, 2]
    assert not found["slots"].any()


def test_a_tree(filled):
    # 0 ─ 1 ─ 3 ─ 4, and 0 ─ 2 ─ 5.
    parents = np.array([-1, 0, 0, 1, 3, 2])
    found = filled(np.arange(10, 16), 70, 6, parents)
    assert found["token_ids"][:6].tolist() == [*range(10, 16)]
    assert found["positions"][:6].tolist() == [70, 71, 71, 72, 73, 72]
    assert found["destinations"][:6].tolist() == [*range(70, 76)]
    assert found["committed"][:6].tolist() == [70] * 6
    assert found["ancestors"][4, :4].tolist() == [0, 1, 3, 4]
    assert found["ancestors"][5, :3].tolist() == [0, 2, 5]
    assert found["logits_rows"][:6].tolist() == [*range(6)]


def test_a_pass_leaves_nothing_to_the_next(filled):
    """A long tree, then a short one and a chain: what a token's path is comes from the latest alone."""
    filled(np.arange(32), 5, 32, np.arange(-1, 31))
    found = filled([1, 2, 3], 100, 1, np.array([-1, -1, 1]))
    for token, path in enumerate(([0], [1], [1, 2])):
        depth = found["positions"][token] - found["committed"][token]
        assert depth == len(path) - 1
        assert found["ancestors"][token, : depth + 1].tolist() == path
    found = filled([1, 2], 6, 1, None)
    assert (found["positions"][:2] < found["committed"][:2]).all()


def test_as_many_tokens_as_there_is_room_for(filled):
    found = filled(np.arange(64), 3, 5, None)
    assert found["positions"].tolist() == [*range(3, 67)]
    assert found["logits_rows"][:5].tolist() == [59, 60, 61, 62, 63]
