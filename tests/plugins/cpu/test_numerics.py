"""The INT8 numbers of the C++ kernels are those of `quasar.numerics`: integers and amax, bit for bit."""

import numpy as np
import pytest

from plugins.cpu.packing import pack_block_scales, pack_weight
from quasar.numerics import AMAX_FLOOR, BLOCK, QMAX, UNIT_STEP, quantize_tokens
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
INPUTS = 8 * BLOCK
# Every weight integer, and a last one that fills the block.
STEPS = np.append(np.arange(-QMAX, QMAX + 1), 0).astype(np.float32)
ATTRIBUTES = {"outputs": INPUTS, "gate": 0, "epsilon": 0.0}


def rows():
    """Name → a row of 256 values, [1, 256]."""
    random = np.random.default_rng(0)
    tiny = np.finfo(np.float32).smallest_subnormal
    ties = np.append(np.arange(-QMAX, QMAX) + 0.5, [QMAX, -QMAX])
    cases = {
        "every integer": STEPS,
        "every integer of another amax": STEPS * np.float32(0.037),
        "ties": ties,
        "ties next to which a bit is set": np.nextafter(ties.astype(np.float32), np.float32(np.inf)),
        "zeros": np.zeros(INPUTS),
        "large values": np.finfo(np.float32).max / 2 * np.sign(STEPS),
        "one value that fills the range": np.eye(1, INPUTS, 5) * -3,
        "below the floor": STEPS * AMAX_FLOOR / 1000,
        "at the floor": STEPS / QMAX * AMAX_FLOOR,
        "subnormal": STEPS * tiny,
        "subnormal beside the floor": np.append(STEPS[:-1] * tiny, AMAX_FLOOR),
        "normal values": random.standard_normal(INPUTS),
    }
    return {name: np.asarray(row, np.float32).reshape(1, -1) for name, row in cases.items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", rows())
def test_per_token(name, level):
    """An identity weight of scale 1 leaves q · (1/127) · a, which tells integers apart."""
    x = rows()[name]
    q, a = quantize_tokens(x)
    inputs = [x, pack_weight(np.eye(INPUTS, dtype=np.int8)), np.ones(INPUTS, np.float32), None, None, None]
    [y] = run_operator("W8A8Linear", inputs, ATTRIBUTES, level=level)
    np.testing.assert_array_equal(y, q * np.float32(UNIT_STEP) * a)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", rows())
def test_in_blocks(name, level):
    x = rows()[name]
    q, a = quantize_tokens(x.reshape(1, -1, BLOCK))
    scale = pack_block_scales(np.ones((INPUTS, INPUTS // BLOCK), np.float32))
    inputs = [x, pack_weight(np.eye(INPUTS, dtype=np.int8), blocks=True), scale, None, None, None]
    [y] = run_operator("W8A8BlockLinear", inputs, ATTRIBUTES, level=level)
    np.testing.assert_array_equal(y, (q * (np.float32(UNIT_STEP) * a)).reshape(x.shape))


@pytest.mark.parametrize("level", LEVELS)
def test_every_weight_integer(level):
    """A row that is 127 at one place reads that column of the weight."""
    values = np.zeros((INPUTS, INPUTS), np.int8)
    values[:, 0] = STEPS
    x = np.eye(1, INPUTS, dtype=np.float32)
    inputs = [x, pack_weight(values), np.full(INPUTS, QMAX, np.float32), None, None, None]
    [y] = run_operator("W8A8Linear", inputs, ATTRIBUTES, level=level)
    np.testing.assert_array_equal(y[0], QMAX * STEPS)
