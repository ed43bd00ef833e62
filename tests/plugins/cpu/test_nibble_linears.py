"""W4A8BlockLinear and W4A16BlockLinear on every level that this CPU runs, against their numpy references."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plugins.cpu.packing import pack_block_scales, pack_nibbles
from plugins.w8a8_linear import GELU, NO_GATE, SILU, w4a16_block_linear, w8a8_block_linear
from quasar.numerics import BLOCK, WIDE_MAX
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
QUICK = settings(deadline=None, max_examples=40, database=None, derandomize=True)
GROUPS = (BLOCK, 2 * BLOCK, 4 * BLOCK)
W4A8, W4A16 = "W4A8BlockLinear", "W4A16BlockLinear"
OPERATORS = (W4A8, W4A16)
# The 8-bit reference asks for no more than integers, and a scale for every block.
REFERENCES = {W4A8: w8a8_block_linear, W4A16: w4a16_block_linear}
# Of the sum of magnitudes. The reference rounds a fused multiply-add twice, and the gate has an exponential of its own.
ERROR = 4e-6

shapes = {
    "rows": st.integers(1, 40),
    "outputs": st.sampled_from([1, 15, 16, 17, 31, 32, 33, 65, 100]),
    "group": st.sampled_from(GROUPS),
    "seed": st.integers(0, 2**31),
}
ANY_INPUTS = st.sampled_from([1, 3, 4, 31, 32, 33, 64, 100, 129, 576])


def linear(operator, x, values, scale, *, level, group, gate=NO_GATE, threads=1, epsilon=0.0, offset=None, **optional):
    """With an offset, values are from 0 to 15."""
    gated = gate != NO_GATE
    packed = pack_nibbles(values if offset is None else values - np.int8(8), gated=gated)
    parts = [scale] if offset is None else [scale, offset]
    scales = np.concatenate([pack_block_scales(part, gated=gated) for part in parts], axis=2)
    inputs = [x, packed, scales, *(optional.get(name) for name in ("bias", "residual", "norm"))]
    attributes = {
        "outputs": len(values) // 2 if gated else len(values),
        "gate": gate,
        "epsilon": float(epsilon),
        "group_size": group,
        "offsets": int(offset is not None),
    }
    return run_operator(operator, inputs, attributes, level=level, threads=threads)[0]


def reference(operator, x, values, scale, *, group, offset=None, **options):
    blocks = -(-values.shape[1] // BLOCK)

    def by_block(halves):
        return np.repeat(halves.astype(np.float32), group // BLOCK, axis=1)[:, :blocks]

    shift = None if offset is None else by_block(offset)
    return REFERENCES[operator](x, values, by_block(scale), offset=shift, **options)


def weights(random, outputs, inputs, group):
    values = random.integers(-8, 8, (outputs, inputs)).astype(np.int8)
    # Whole columns of one extreme: where 16-bit sums are largest.
    values[random.random(outputs) < 0.2] = random.choice([-8, 7])
    scale = random.uniform(1e-3, 0.02, (outputs, -(-inputs // group))).astype(np.float16)
    return values, scale


def with_offsets(random, values, scale):
    """Values from 0 to 15, and offsets that bring most weights back around zero."""
    return values + np.int8(8), (-8 * scale * random.uniform(0.5, 1.5, scale.shape)).astype(np.float16)


def whole(operator, inputs):
    """Rows of two planes are of whole blocks."""
    return inputs if operator == W4A8 else -(-inputs // BLOCK) * BLOCK


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(inputs=ANY_INPUTS, **shapes)
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
    y = linear(W4A8, x, values, scale, level=level, group=group)
    # 127 times the float32 next to 1/127 is off by less than 2^-24, once a block.
    size = 127 * (np.abs(x).astype(np.float64) @ np.abs(values * by_input).T)
    assert (np.abs(y * 127.0 - expected) <= (blocks + 1) * 2.0**-24 * size).all()


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(inputs=ANY_INPUTS, offsets=st.booleans(), **shapes)
@example(rows=9, inputs=576, outputs=100, group=128, offsets=True, seed=0)
def test_integers_of_two_planes_are_exact(level, offsets, rows, inputs, outputs, group, seed):
    """Whole numbers with the largest in every block: sums of integers, and a rounding of the scale alone."""
    random, inputs = np.random.default_rng(seed), whole(W4A16, inputs)
    x = random.integers(-WIDE_MAX, WIDE_MAX + 1, (rows, inputs)).astype(np.float32)
    # Where the second plane is at its ends, and the first goes on to the next integer.
    x[random.random(x.shape) < 0.2] = random.choice([127, 128, -128, -129, 256 * 90 + 128])
    x[:, ::BLOCK] = random.choice([-WIDE_MAX, WIDE_MAX], (rows, inputs // BLOCK))
    values, scale = weights(random, outputs, inputs, group)
    scale[:] = 2.0 ** random.integers(-3, 4, scale.shape)
    by_input = np.repeat(scale.astype(np.float64), group, axis=1)[:, :inputs]
    expected, size = x @ (values * by_input).T, np.abs(x) @ np.abs(values * by_input).T
    offset = None
    if offsets:
        values, offset = values + np.int8(8), (-8 * scale).astype(np.float16)
        size = np.abs(x) @ (values * by_input + 8 * by_input).T
    y = linear(W4A16, x, values, scale, level=level, group=group, offset=offset)
    # The step times the amax is off by less than 2^-23, and each block rounds once or twice more.
    assert (np.abs(y - expected) <= (2 * inputs // BLOCK + 2) * 2.0**-23 * size).all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(
    inputs=ANY_INPUTS,
    bias=st.booleans(),
    residual=st.booleans(),
    offsets=st.booleans(),
    gate=st.sampled_from([NO_GATE, SILU, GELU]),
    **shapes,
)
def test_they_equal_their_references(
    operator, level, bias, residual, offsets, gate, rows, inputs, outputs, group, seed
):
    random, inputs = np.random.default_rng(seed), whole(operator, inputs)
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
    y = linear(operator, x, values, scale, level=level, group=group, gate=gate, **optional)
    expected = reference(operator, x, values, scale, group=group, gate=gate, **optional)
    largest = {"offset": None if offset is None else np.abs(offset), "gate": gate}
    size = np.abs(expected) + np.abs(reference(operator, np.abs(x), np.abs(values), scale, group=group, **largest))
    np.testing.assert_array_less(np.abs(y - expected), ERROR * size + 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("extreme", [-8, 7])
def test_the_largest_sums_of_a_block(level, extreme):
    """Every product of a block at its largest: 16-bit sums must hold them, and float32 those of two planes."""
    for sign, operator in itertools.product((-1, 1), OPERATORS):
        x = np.full((5, 64), sign, np.float32)
        values, scale = np.full((40, 64), extreme, np.int8), np.full((40, 2), 1, np.float16)
        y = linear(operator, x, values, scale, level=level, group=BLOCK)
        np.testing.assert_allclose(y, 64 * sign * extreme, rtol=3e-7)
    # A second plane of -128 everywhere but in the first input, beside weights of 15 without an offset.
    x = np.full((5, 32), -128 / WIDE_MAX, np.float32)
    x[:, 0] = 1
    values, scale = np.full((40, 32), 15, np.int8), np.full((40, 1), 1, np.float16)
    y = linear(W4A16, x, values, scale, level=level, group=BLOCK, offset=np.zeros_like(scale))
    np.testing.assert_allclose(y, 15 * (1 - 31 * 128 / WIDE_MAX), rtol=3e-7)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("gate", [NO_GATE, SILU, GELU])
@pytest.mark.parametrize("group", GROUPS)
def test_levels_widths_and_threads_give_the_same_bits(operator, group, gate, offsets):
    random, inputs = np.random.default_rng(11), whole(operator, 200)
    x = random.standard_normal((33, inputs), np.float32)
    values, scale = weights(random, 140, inputs, group)
    norm = random.uniform(0.5, 1.5, inputs).astype(np.float32)
    options = {"group": group, "gate": gate, "norm": norm, "epsilon": 1e-5}
    if offsets:
        values, options["offset"] = with_offsets(random, values, scale)
    expected = linear(operator, x, values, scale, level=LEVELS[0], **options)
    for level in LEVELS:
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(
                linear(operator, x, values, scale, level=level, threads=threads, **options), expected, err_msg=level
            )
        for width in range(1, 33):
            rows = linear(operator, x[-width:], values, scale, level=level, **options)
            np.testing.assert_array_equal(rows, expected[-width:], err_msg=f"{level}, {width} rows")


@pytest.mark.parametrize("level", LEVELS)
def test_they_differ_by_the_rounding_of_activations(level):
    """Blocks of multiples of 1/127 with a largest value of 1: 8 bits stand for them without an error, 16 nearly so."""
    random = np.random.default_rng(2)
    x = (random.integers(-127, 128, (7, 256)) / 127).astype(np.float32)
    x[:, ::BLOCK] = 1
    values, scale = weights(random, 70, 256, BLOCK)
    fine, coarse = (linear(operator, x, values, scale, level=level, group=BLOCK) for operator in (W4A16, W4A8))
    by_input = np.repeat(scale.astype(np.float64), BLOCK, axis=1)
    exact, size = x @ (values * by_input).T, np.abs(x) @ np.abs(values * by_input).T
    np.testing.assert_array_less(np.abs(coarse - exact), 3e-6 * size + 1e-7)
    # Half a step of each input, and what float32 rounds.
    most = 0.5 / WIDE_MAX * np.abs(values * by_input).sum(axis=1)
    np.testing.assert_array_less(np.abs(fine - exact), most + 3e-6 * size)
    assert np.abs(fine - exact).max() < 0.05 * most.max()


@pytest.mark.parametrize("level", LEVELS)
def test_16_bits_are_far_nearer_to_floats_than_8(level):
    random = np.random.default_rng(4)
    x = random.standard_normal((7, 512)).astype(np.float32)
    values, scale = weights(random, 70, 512, BLOCK)
    exact = x @ (values * np.repeat(scale.astype(np.float64), BLOCK, axis=1)).T
    fine, coarse = (linear(operator, x, values, scale, level=level, group=BLOCK) for operator in (W4A16, W4A8))
    assert np.abs(fine - exact).mean() < np.abs(coarse - exact).mean() / 100


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("level", LEVELS)
def test_offsets_alone(operator, level):
    """Weights of 0 stand for their offsets: a row of ones gives their sum, block by block, of at most 127 times 32."""
    random = np.random.default_rng(5)
    offset = (2.0 ** random.integers(-4, 4, (40, 3)) * random.choice([-1, 1], (40, 3))).astype(np.float16)
    values, scale = np.zeros((40, 96), np.int8), np.ones((40, 3), np.float16)
    y = linear(operator, np.ones((3, 96), np.float32), values, scale, level=level, group=BLOCK, offset=offset)
    expected, size = (32 * one.astype(np.float64).sum(axis=1) for one in (offset, np.abs(offset)))
    assert (np.abs(y - expected) <= 3e-7 * size).all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_value_that_is_not_finite_stays_in_its_row(operator, level):
    random, inputs = np.random.default_rng(3), whole(operator, 70)
    x = random.standard_normal((5, inputs), np.float32)
    values, scale = weights(random, 40, inputs, BLOCK)
    clean = linear(operator, x, values, scale, level=level, group=BLOCK)
    for row, bad in ((1, np.nan), (2, np.inf), (4, -np.inf)):
        x[row, 33] = bad
    y = linear(operator, x, values, scale, level=level, group=BLOCK)
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


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_does_not_fit_is_refused(operator):
    values, scale = np.zeros((40, 64), np.int8), np.ones((40, 2), np.float16)
    good = [np.ones((2, 64), np.float32), pack_nibbles(values), pack_block_scales(scale), None, None, None]
    attributes = {"outputs": 40, "gate": NO_GATE, "epsilon": 0.0, "group_size": BLOCK}
    run_operator(operator, good, attributes, level=LEVELS[0])
    lies = [
        (1, good[1][:, :4], r"packed weights are \[2, 4, 16, 4\]; \[2, 16, 16, 4\] was expected"),
        (2, good[2][:, :1].copy(), "64 scales came; 128 were expected"),
    ]
    if operator == W4A16:
        lies.append((0, good[0][:, :60].copy(), "rows of 60 values came; a multiple of 32 was expected"))
    for place, bad, said in lies:
        inputs = [bad if i == place else value for i, value in enumerate(good)]
        with pytest.raises(Exception, match=f"{operator}: {said}"):
            run_operator(operator, inputs, attributes, level=LEVELS[0])
    with pytest.raises(Exception, match="128 scales came; 256 were expected"):
        run_operator(operator, good, attributes | {"offsets": 1}, level=LEVELS[0])
    with pytest.raises(Exception, match="offsets 2 came; 0 or 1 was expected"):
        run_operator(operator, good, attributes | {"offsets": 2}, level=LEVELS[0])
    for group in (0, 16, 48, -32, 1 << 40):
        with pytest.raises(Exception, match=f"a group of {group} inputs came; a multiple of 32 was expected"):
            run_operator(operator, good, attributes | {"group_size": group}, level=LEVELS[0])
