"""W4A16BlockLinear on every level that this CPU runs, against its numpy reference."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.cpu.packing import pack_block_scales, pack_nibbles
from plugins.w8a8_linear import GELU, NO_GATE, SILU, w4a16_block_linear
from quasar.numerics import BLOCK
from tests.plugins.cpu.nibbles import GROUPS, QUICK, SHAPES, by_block, nibble_linear, weights, with_offsets
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
SHAPES_OF_WHOLE_BLOCKS = SHAPES | {"inputs": st.sampled_from([32, 64, 96, 160, 576])}
linear = functools.partial(nibble_linear, "W4A16BlockLinear")


def reference(x, values, scale, *, group, offset=None, **options):
    inputs = values.shape[1]
    shift = None if offset is None else by_block(offset, group, inputs)
    return w4a16_block_linear(x, values, by_block(scale, group, inputs), offset=shift, **options)


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(offsets=st.booleans(), **SHAPES_OF_WHOLE_BLOCKS)
def test_small_integers_are_exact(level, offsets, rows, inputs, outputs, group, seed):
    """Rows of small integers, and scales and offsets of powers of two: no sum is ever rounded."""
    random = np.random.default_rng(seed)
    x = random.integers(-9, 10, (rows, inputs)).astype(np.float32)
    values, scale = weights(random, outputs, inputs, group)
    scale[:] = 2.0 ** random.integers(-3, 4, scale.shape)
    offset = None
    whole = np.repeat(scale.astype(np.float64), group, axis=1)[:, :inputs]
    expected = values * whole
    if offsets:
        values, offset = values + np.int8(8), (-8 * scale).astype(np.float16)
    y = linear(x, values, scale, level=level, group=group, offset=offset)
    np.testing.assert_array_equal(y, x.astype(np.float64) @ expected.T)


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(
    bias=st.booleans(),
    residual=st.booleans(),
    offsets=st.booleans(),
    gate=st.sampled_from([NO_GATE, SILU, GELU]),
    **SHAPES_OF_WHOLE_BLOCKS,
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
    # The order of sums is the same. The reference rounds a fused multiply-add twice, now and then; the gate has an
    # exponential of its own.
    largest = {"offset": None if offset is None else np.abs(offset), "gate": gate}
    size = np.abs(expected) + np.abs(reference(np.abs(x), np.abs(values), scale, group=group, **largest))
    np.testing.assert_array_less(np.abs(y - expected), 2e-6 * size + 1e-6)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("gate", [NO_GATE, SILU, GELU])
@pytest.mark.parametrize("group", GROUPS)
def test_levels_widths_and_threads_give_the_same_bits(group, gate, offsets):
    random = np.random.default_rng(11)
    x = random.standard_normal((33, 192), np.float32)
    values, scale = weights(random, 140, 192, group)
    norm = random.uniform(0.5, 1.5, 192).astype(np.float32)
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
def test_it_is_w4a8_without_the_rounding_of_activations(level):
    """Rows whose blocks hold nothing but 127 of one size: INT8 stands for them without an error."""
    random = np.random.default_rng(2)
    x = (random.integers(-127, 128, (7, 256)) / 127).astype(np.float32)
    x[:, ::BLOCK] = 1
    values, scale = weights(random, 70, 256, BLOCK)
    coarse = nibble_linear("W4A8BlockLinear", x, values, scale, level=level, group=BLOCK)
    size = np.abs(x) @ np.abs(values * np.repeat(scale.astype(np.float32), BLOCK, axis=1)).T
    np.testing.assert_array_less(
        np.abs(linear(x, values, scale, level=level, group=BLOCK) - coarse), 3e-6 * size + 1e-7
    )


@pytest.mark.parametrize("level", LEVELS)
def test_a_value_that_is_not_finite_makes_its_row_nan_or_infinite_and_no_other(level):
    random = np.random.default_rng(3)
    x = random.standard_normal((5, 96), np.float32)
    values, scale = weights(random, 40, 96, BLOCK)
    clean = linear(x, values, scale, level=level, group=BLOCK)
    for row, bad in ((1, np.nan), (2, np.inf), (4, -np.inf)):
        x[row, 33] = bad
    y = linear(x, values, scale, level=level, group=BLOCK)
    assert not np.isfinite(y[[1, 2, 4]]).any()
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


def test_what_does_not_fit_is_refused():
    values, scale = np.zeros((40, 64), np.int8), np.ones((40, 2), np.float16)
    good = [np.ones((2, 64), np.float32), pack_nibbles(values), pack_block_scales(scale), None, None, None]
    attributes = {"outputs": 40, "gate": NO_GATE, "epsilon": 0.0, "group_size": BLOCK}
    run_operator("W4A16BlockLinear", good, attributes, level=LEVELS[0])
    for place, bad, said in (
        (0, good[0][:, :60].copy(), "W4A16BlockLinear: rows of 60 values came; a multiple of 32 was expected"),
        (1, good[1][:, :4], r"packed weights are \[2, 4, 16, 4\]; \[2, 16, 16, 4\] was expected"),
        (2, good[2][:, :1].copy(), "64 scales came; 128 were expected"),
    ):
        inputs = [bad if i == place else value for i, value in enumerate(good)]
        with pytest.raises(Exception, match=said):
            run_operator("W4A16BlockLinear", inputs, attributes, level=LEVELS[0])
