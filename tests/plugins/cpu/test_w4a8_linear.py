"""W4A8BlockLinear on every level that this CPU runs, against its numpy reference."""

import functools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plugins.cpu.packing import pack_block_scales, pack_nibbles
from plugins.w8a8_linear import GELU, NO_GATE, SILU, w8a8_block_linear
from quasar.numerics import BLOCK
from tests.plugins.cpu.nibbles import GROUPS, QUICK, SHAPES, by_block, nibble_linear, weights, with_offsets
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
SHAPES_OF_ANY_INPUTS = SHAPES | {"inputs": st.sampled_from([1, 3, 4, 31, 32, 33, 64, 100, 129, 576])}
linear = functools.partial(nibble_linear, "W4A8BlockLinear")


def reference(x, values, scale, *, group, offset=None, **options):
    """The 8-bit reference: it asks for no more than integers, and a scale for every block."""
    inputs = values.shape[1]
    shift = None if offset is None else by_block(offset, group, inputs)
    return w8a8_block_linear(x, values, by_block(scale, group, inputs), offset=shift, **options)


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(**SHAPES_OF_ANY_INPUTS)
@example(rows=9, inputs=576, outputs=100, group=128, seed=0)
def test_integers_are_exact(level, rows, inputs, outputs, group, seed):
    """Rows of ±1 under scales of a power of two: sums of integers, times 127 and that power, and no rounding."""
    random = np.random.default_rng(seed)
    x = random.choice(np.float32([-1, 1]), (rows, inputs))
    values, scale = weights(random, outputs, inputs, group)
    scale[:] = 2.0 ** random.integers(-8, 3, scale.shape)
    blocks = -(-inputs // BLOCK)
    by_input = np.repeat(scale.astype(np.float64), group, axis=1)[:, :inputs]
    expected = 127 * (x.astype(np.float64) @ (values * by_input).T)
    y = linear(x, values, scale, level=level, group=group)
    # 127 times the float32 next to 1/127 is off by less than 2^-24, once a block.
    size = 127 * (np.abs(x).astype(np.float64) @ np.abs(values * by_input).T)
    assert (np.abs(y * 127.0 - expected) <= (blocks + 1) * 2.0**-24 * size).all()


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(
    bias=st.booleans(),
    residual=st.booleans(),
    offsets=st.booleans(),
    gate=st.sampled_from([NO_GATE, SILU, GELU]),
    **SHAPES_OF_ANY_INPUTS,
)
def test_it_equals_the_reference(level, bias, residual, offsets, gate, rows, inputs, outputs, group, seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, inputs), np.float32)
    columns = 2 * outputs if gate != NO_GATE else outputs
    values, scale = weights(random, columns, inputs, group)
    offset = None
    if offsets:
        values, offset = with_offsets(random, values, scale)
    optional = {
        "offset": offset,
        "bias": random.standard_normal(columns, np.float32) if bias else None,
        "residual": random.standard_normal((rows, outputs), np.float32) if residual else None,
    }
    y = linear(x, values, scale, level=level, group=group, gate=gate, **optional)
    expected = reference(x, values, scale, group=group, gate=gate, **optional)
    # As for 8 bits: a fused multiply-add for each block, where the reference rounds twice, and the gate's exponential.
    largest = {"offset": None if offset is None else np.abs(offset), "gate": gate}
    size = np.abs(expected) + np.abs(reference(np.abs(x), np.abs(values), scale, group=group, **largest))
    np.testing.assert_array_less(np.abs(y - expected), 4e-6 * size + 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("extreme", [-8, 7])
def test_the_largest_sums_of_a_block(level, extreme):
    """Every product of a block at its largest, in every column: 16-bit sums must hold them."""
    for sign in (-1, 1):
        x = np.full((5, 64), sign, np.float32)
        values, scale = np.full((40, 64), extreme, np.int8), np.full((40, 2), 1, np.float16)
        y = linear(x, values, scale, level=level, group=BLOCK)
        np.testing.assert_allclose(y, 64 * sign * extreme, rtol=2e-7)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("gate", [NO_GATE, SILU, GELU])
@pytest.mark.parametrize("group", GROUPS)
def test_levels_widths_and_threads_give_the_same_bits(group, gate, offsets):
    random = np.random.default_rng(11)
    x = random.standard_normal((33, 200), np.float32)
    values, scale = weights(random, 140, 200, group)
    norm = random.uniform(0.5, 1.5, 200).astype(np.float32)
    options = {"group": group, "gate": gate, "norm": norm, "epsilon": 1e-5}
    if offsets:
        values, options["offset"] = with_offsets(random, values, scale)
    whole = linear(x, values, scale, level=LEVELS[0], **options)
    for level in LEVELS:
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(
                linear(x, values, scale, level=level, threads=threads, **options), whole, err_msg=level
            )
        for width in range(1, 33):
            rows = linear(x[-width:], values, scale, level=level, **options)
            np.testing.assert_array_equal(rows, whole[-width:], err_msg=f"{level}, {width} rows")


@pytest.mark.parametrize("level", LEVELS)
def test_offsets_alone(level):
    """Weights of 0 stand for their offsets: a row of ones gives their sum, block by block, of at most 127 times 32."""
    random = np.random.default_rng(5)
    offset = (2.0 ** random.integers(-4, 4, (40, 3)) * random.choice([-1, 1], (40, 3))).astype(np.float16)
    values, scale = np.zeros((40, 96), np.int8), np.ones((40, 3), np.float16)
    y = linear(np.ones((3, 96), np.float32), values, scale, level=level, group=BLOCK, offset=offset)
    np.testing.assert_allclose(y, np.broadcast_to(32 * offset.astype(np.float32).sum(axis=1), (3, 40)), rtol=3e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(level):
    random = np.random.default_rng(3)
    x = random.standard_normal((5, 70), np.float32)
    values, scale = weights(random, 40, 70, BLOCK)
    clean = linear(x, values, scale, level=level, group=BLOCK)
    for row, bad in ((1, np.nan), (2, np.inf), (4, -np.inf)):
        x[row, 33] = bad
    y = linear(x, values, scale, level=level, group=BLOCK)
    assert np.isnan(y[[1, 2, 4]]).all()
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


def test_packing_puts_two_columns_in_a_byte():
    values = (np.arange(35 * 6).reshape(35, 6) % 16 - 8).astype(np.int8)
    packed = pack_nibbles(values)
    assert packed.shape == (2, BLOCK // 4, 16, 4)
    for column, row in ((0, 0), (15, 5), (16, 1), (31, 5), (32, 3), (34, 5)):
        byte = packed[column // 32, row // 4, column % 16, row % 4]
        assert byte >> (4 if column % 32 >= 16 else 0) & 15 == int(values[column, row]) + 8
    # Padding is a weight of zero.
    assert (packed[:, 2:] == 0x88).all()
    gate_up = pack_nibbles(np.concatenate([values, -1 - values]), gated=True)
    np.testing.assert_array_equal(gate_up[0::2], packed)
    np.testing.assert_array_equal(gate_up[1::2], pack_nibbles(-1 - values))


def test_what_does_not_fit_is_refused():
    values, scale = np.zeros((40, 64), np.int8), np.ones((40, 2), np.float16)
    x = np.ones((2, 64), np.float32)
    good = [x, pack_nibbles(values), pack_block_scales(scale), None, None, None]
    attributes = {"outputs": 40, "gate": NO_GATE, "epsilon": 0.0, "group_size": BLOCK}
    run_operator("W4A8BlockLinear", good, attributes, level=LEVELS[0])
    for place, bad, said in (
        (1, good[1][:, :4], r"packed weights are \[2, 4, 16, 4\]; \[2, 16, 16, 4\] was expected"),
        (2, good[2][:, :1].copy(), "64 scales came; 128 were expected"),
    ):
        inputs = [bad if i == place else value for i, value in enumerate(good)]
        with pytest.raises(Exception, match=said):
            run_operator("W4A8BlockLinear", inputs, attributes, level=LEVELS[0])
    with pytest.raises(Exception, match="128 scales came; 256 were expected"):
        run_operator("W4A8BlockLinear", good, attributes | {"offsets": 1}, level=LEVELS[0])
    with pytest.raises(Exception, match="offsets 2 came; 0 or 1 was expected"):
        run_operator("W4A8BlockLinear", good, attributes | {"offsets": 2}, level=LEVELS[0])
    for group in (0, 16, 48, -32, 1 << 40):
        with pytest.raises(Exception, match=f"a group of {group} inputs came; a multiple of 32 was expected"):
            run_operator("W4A8BlockLinear", good, attributes | {"group_size": group}, level=LEVELS[0])
