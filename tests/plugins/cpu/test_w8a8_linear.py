"""W8A8Linear and W8A8BlockLinear on every level that this CPU runs, against their numpy references."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plugins.cpu.packing import (
    TILE,
    pack_block_scales,
    pack_nibbles,
    pack_weight,
    unpack_block_scales,
    unpack_nibbles,
    unpack_weight,
)
from plugins.w8a8_linear import GELU, NO_GATE, SILU, gelu_tanh, quantize_rows, w8a8_block_linear, w8a8_linear
from quasar.errors import QuasarError
from quasar.numerics import BLOCK
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
QUICK = settings(deadline=None, max_examples=40, database=None, derandomize=True)

shapes = {
    "rows": st.integers(1, 64),
    "inputs": st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 100, 129, 576]),
    "outputs": st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 96, 100]),
    "seed": st.integers(0, 2**31),
}


def linear(x, values, scale, *, level, blocks=False, gate=NO_GATE, threads=1, epsilon=0.0, **optional):
    if blocks:
        scale = pack_block_scales(scale, gated=gate != NO_GATE)
    packed = pack_weight(values, gated=gate != NO_GATE, blocks=blocks)
    inputs = [x, packed, scale, *(optional.get(name) for name in ("bias", "residual", "norm"))]
    attributes = {
        "outputs": len(values) // 2 if gate != NO_GATE else len(values),
        "gate": gate,
        "epsilon": float(epsilon),
    }
    return run_operator(
        "W8A8BlockLinear" if blocks else "W8A8Linear", inputs, attributes, level=level, threads=threads
    )[0]


def weights(random, outputs, inputs):
    values = random.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    # Whole columns of extreme values: where 16-bit sums would saturate.
    values[random.random(outputs) < 0.2] = random.choice([-127, 127])
    return values


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(**shapes)
@example(rows=64, inputs=576, outputs=100, seed=0)
@example(rows=1, inputs=1, outputs=1, seed=1)
def test_integers_are_exact(level, rows, inputs, outputs, seed):
    """Rows of amax 2^k and scales of 127 leave the integer sum itself, times 2^k."""
    random = np.random.default_rng(seed)
    x = random.uniform(-1, 1, (rows, inputs)).astype(np.float32)
    x[:, random.integers(inputs)] = random.choice([-1, 1])
    x *= 2.0 ** random.integers(-10, 10, (rows, 1)).astype(np.float32)
    x[random.random(rows) < 0.1] = 0
    values = weights(random, outputs, inputs)
    q, a = quantize_rows(x)
    sums = q.astype(np.int64) @ values.T.astype(np.int64)
    assert np.abs(sums).max() < 2**24
    y = linear(x, values, np.full(outputs, 127, np.float32), level=level)
    np.testing.assert_array_equal(y, sums * a[:, None].astype(np.float64))


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(bias=st.booleans(), residual=st.booleans(), **shapes)
def test_products_bias_and_residual_round_as_the_reference_does(level, bias, residual, rows, inputs, outputs, seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, inputs), np.float32)
    values, scale = weights(random, outputs, inputs), random.uniform(1e-3, 0.1, outputs).astype(np.float32)
    optional = {
        "bias": random.standard_normal(outputs, np.float32) if bias else None,
        "residual": random.standard_normal((rows, outputs), np.float32) if residual else None,
    }
    # The same operations in the same order: bit for bit.
    np.testing.assert_array_equal(
        linear(x, values, scale, level=level, **optional), w8a8_linear(x, values, scale, **optional)
    )


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(bias=st.booleans(), gate=st.sampled_from([SILU, GELU]), **shapes)
def test_gates(level, bias, gate, rows, inputs, outputs, seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, inputs), np.float32) * 3
    values = weights(random, 2 * outputs, inputs)
    scale = random.uniform(1e-3, 0.02, 2 * outputs).astype(np.float32)
    extra = {"bias": random.standard_normal(2 * outputs, np.float32)} if bias else {}
    y = linear(x, values, scale, level=level, gate=gate, **extra)
    expected = w8a8_linear(x, values, scale, gate=gate, **extra)
    # Of silu two products, a quotient and an exponential of 2 ulp: 6 ulp, and exponentials end at e^-87. Of gelu the
    # rounding of 2u, up to 88 of 2^-23 each, becomes a relative error of its exponential.
    np.testing.assert_allclose(y, expected, rtol=8e-7 if gate == SILU else 2.5e-5, atol=1e-30)


def gated_columns(gates, *, level, gate, blocks=False):
    """act(gate) of chosen float32 values, each twice: they are the bias of a linear whose product is 0."""
    count = len(gates)
    bias = np.append(gates, np.ones(count, np.float32))
    scale = np.ones((2 * count, 1) if blocks else 2 * count, np.float32)
    values = np.zeros((2 * count, 4), np.int8)
    x = np.zeros((2, 4), np.float32)
    return linear(x, values, scale, level=level, blocks=blocks, gate=gate, bias=bias)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_gelu_of_every_size_of_value(level, blocks):
    sizes = np.append(np.geomspace(1e-45, 3e38, 999), [np.finfo(np.float32).max, 0])
    gates = np.concatenate([sizes, -sizes, np.linspace(-20, 20, 2001)]).astype(np.float32)
    y = gated_columns(gates, level=level, gate=GELU, blocks=blocks)
    np.testing.assert_array_equal(y[0], y[1])
    expected = gelu_tanh(gates).astype(np.float64)
    # A quotient, a sum and an exponential of 2 ulp, whose argument 2u has a relative error of 2^-22, which weighs
    # |2u| e^-|2u| < 0.37: at most 4 ulp of x. Below -16 e^-88 is left; subnormal products are off by their last bit.
    assert (np.abs(y[0] - expected) <= 2.5e-7 * np.abs(np.maximum(gates, -16).astype(np.float64)) + 1e-37).all()
    # Where it is all of x, it is x itself, and where it is nothing no number that a residual sum could notice.
    np.testing.assert_array_equal(y[0][gates > 12], gates[gates > 12])
    assert (np.abs(y[0][gates < -16]) < 1e-37).all()
    # The negative side has digits, where 1 + tanh(u) would have none left.
    tail = (gates < -4) & (gates > -9)
    assert (np.abs(y[0][tail] / expected[tail] - 1) < 2.5e-5).all()
    assert not np.isnan(y).any()


@pytest.mark.parametrize("gate", [SILU, GELU])
@pytest.mark.parametrize("level", LEVELS)
def test_a_gate_that_is_no_number_makes_its_column_nan_and_no_other(level, gate):
    gates = np.linspace(-3, 3, 40).astype(np.float32)
    clean = gated_columns(gates, level=level, gate=gate)
    gates[[0, 17, 39]] = np.nan
    y = gated_columns(gates, level=level, gate=gate)
    kept = ~np.isnan(gates)
    assert np.isnan(y[:, ~kept]).all()
    np.testing.assert_array_equal(y[:, kept], clean[:, kept])


@pytest.mark.parametrize("gated", [0, 1])
def test_graphs_of_earlier_versions_say_swiglu(gated):
    """0 and 1 mean there what they mean as `gate`."""
    random = np.random.default_rng(2)
    x, values = random.standard_normal((3, 20), np.float32), weights(random, 80, 20)
    scale = np.full(80, 0.01, np.float32)
    inputs = [x, pack_weight(values, gated=bool(gated)), scale, None, None, None]
    attributes = {"outputs": 40 if gated else 80, "epsilon": 0.0}
    [y] = run_operator("W8A8Linear", inputs, attributes | {"swiglu": gated}, level=LEVELS[0])
    np.testing.assert_array_equal(y, linear(x, values, scale, level=LEVELS[0], gate=gated))
    with pytest.raises(Exception, match="swiglu"):
        run_operator("W8A8Linear", inputs, attributes, level=LEVELS[0])
    with pytest.raises(Exception, match=r"gate 3 came; 0 \(none\), 1 \(silu\) or 2 \(gelu\) was expected"):
        run_operator("W8A8Linear", inputs, attributes | {"gate": 3}, level=LEVELS[0])


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(**shapes)
def test_the_norm_before_it(level, rows, inputs, outputs, seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, inputs), np.float32)
    norm = random.uniform(0.5, 1.5, inputs).astype(np.float32)
    values, scale = weights(random, outputs, inputs), random.uniform(1e-3, 0.1, outputs).astype(np.float32)
    y = linear(x, values, scale, level=level, norm=norm, epsilon=1e-5)
    expected = w8a8_linear(x, values, scale, norm=norm, epsilon=1e-5)
    # The norm's sum rounds differently, so a value on a tie may fall to the other side: one step of one input.
    h = np.abs(x).max(axis=1) / np.sqrt(np.square(x).mean(axis=1) + 1e-5) * 1.5
    step = (h / 127)[:, None] * (np.abs(values).max(axis=1) * scale)[None]
    assert (np.abs(y - expected) <= 2 * step + 1e-4).all()


@pytest.mark.parametrize("level", LEVELS)
@QUICK
@given(bias=st.booleans(), residual=st.booleans(), gate=st.sampled_from([NO_GATE, SILU, GELU]), **shapes)
def test_block_linear(level, bias, residual, gate, rows, inputs, outputs, seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, inputs), np.float32)
    columns = 2 * outputs if gate != NO_GATE else outputs
    values = weights(random, columns, inputs)
    scale = random.uniform(1e-3, 0.02, (columns, -(-inputs // BLOCK))).astype(np.float32)
    optional = {
        "bias": random.standard_normal(columns, np.float32) if bias else None,
        "residual": random.standard_normal((rows, outputs), np.float32) if residual else None,
    }
    y = linear(x, values, scale, level=level, blocks=True, gate=gate, **optional)
    expected = w8a8_block_linear(x, values, scale, gate=gate, **optional)
    # A fused multiply-add for each block; the reference rounds twice where float64 is not wide enough. With a gate the
    # error of both factors, and the exponential's.
    size = np.abs(expected) + np.abs(w8a8_block_linear(np.abs(x), np.abs(values), scale, gate=gate))
    np.testing.assert_array_less(np.abs(y - expected), 4e-6 * size + 1e-6)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(level, blocks):
    random = np.random.default_rng(3)
    x = random.standard_normal((5, 70), np.float32)
    values = weights(random, 40, 70)
    scale = np.full((40, 3) if blocks else 40, 0.01, np.float32)
    clean = linear(x, values, scale, level=level, blocks=blocks)
    for row, bad in ((1, np.nan), (2, np.inf), (4, -np.inf)):
        x[row, 33] = bad
    y = linear(x, values, scale, level=level, blocks=blocks)
    assert np.isnan(y[[1, 2, 4]]).all()
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("level", LEVELS)
def test_extreme_rows(level):
    """The largest floats, subnormal ones, rows of zeros, and the same value everywhere."""
    largest = np.finfo(np.float32).max
    x = np.stack([np.full(64, value, np.float32) for value in (largest, -largest, 1e-45, 0, 2.0**-14, 2.0**-15)])
    x[0, ::2] *= -1
    values = weights(np.random.default_rng(0), 33, 64)
    scale = np.full(33, 1e-6, np.float32)
    with np.errstate(over="ignore"):
        expected = w8a8_linear(x, values, scale)
    np.testing.assert_array_equal(linear(x, values, scale, level=level), expected)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("gate", [NO_GATE, SILU, GELU])
def test_levels_widths_and_threads_give_the_same_bits(blocks, gate):
    random = np.random.default_rng(11)
    x = random.standard_normal((33, 200), np.float32)
    values = weights(random, 140, 200)
    scale = random.uniform(1e-3, 0.02, (140, 7) if blocks else 140).astype(np.float32)
    norm = random.uniform(0.5, 1.5, 200).astype(np.float32)
    options = {"blocks": blocks, "gate": gate, "norm": norm, "epsilon": 1e-5}
    whole = linear(x, values, scale, level=LEVELS[0], **options)
    for level in LEVELS:
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(
                linear(x, values, scale, level=level, threads=threads, **options), whole, err_msg=level
            )
        for width in range(1, 33):
            rows = linear(x[-width:], values, scale, level=level, **options)
            np.testing.assert_array_equal(rows, whole[-width:], err_msg=f"{level}, {width} rows")


def test_packing_puts_four_inputs_of_a_column_side_by_side():
    values = np.arange(-100, 110).astype(np.int8).reshape(35, 6)
    packed = pack_weight(values)
    assert packed.shape == (2, 2, TILE, 4)
    for column, row in ((0, 0), (31, 5), (32, 3), (34, 5)):
        assert packed[column // TILE, row // 4, column % TILE, row % 4] == int(values[column, row]) + 128
    # Padding is a weight of zero.
    assert (packed[1, :, 3:] == 128).all()
    assert (packed[:, 1, :, 2:] == 128).all()
    gate_up = pack_weight(np.concatenate([values, -values]), gated=True)
    np.testing.assert_array_equal(gate_up[0::2], packed)
    np.testing.assert_array_equal(gate_up[1::2], pack_weight(-values))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (2, 32), (130, 300), (66, 127)])
def test_unpacking_gives_back_what_was_packed(outputs, inputs, gated):
    random = np.random.default_rng(outputs)
    values = random.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    for blocks in (False, True):
        packed = pack_weight(values, gated=gated, blocks=blocks)
        np.testing.assert_array_equal(unpack_weight(packed, outputs, inputs, gated=gated), values)
    nibbles = random.integers(-8, 8, (outputs, inputs)).astype(np.int8)
    packed = pack_nibbles(nibbles, gated=gated)
    np.testing.assert_array_equal(unpack_nibbles(packed, outputs, inputs, gated=gated), nibbles)
    scales = random.standard_normal((outputs, 7)).astype(np.float16)
    packed = pack_block_scales(scales, gated=gated)
    np.testing.assert_array_equal(unpack_block_scales(packed, outputs, gated=gated), scales)


def test_a_linear_whose_sums_could_overflow_is_refused():
    with pytest.raises(QuasarError, match="70000 inputs came; at most 65536"):
        pack_weight(np.zeros((1, 70000), np.int8))


def test_the_widest_linear_does_not_overflow():
    x, values = np.ones((2, 65536), np.float32), np.full((3, 65536), -127, np.int8)
    for level in LEVELS:
        y = linear(x, values, np.full(3, 2.0**-10, np.float32), level=level)
        np.testing.assert_array_equal(y, w8a8_linear(x, values, np.full(3, 2.0**-10, np.float32)))


BAD = {
    "packed weights are": {1: np.zeros((2, 2, 32, 4), np.uint8)},
    "scales came; 40 were": {2: np.ones(39, np.float32)},
    "a bias of 3 values": {3: np.ones(3, np.float32)},
    "a residual of 40 values": {4: np.ones((1, 40), np.float32)},
    "a norm of 4 values": {5: np.ones(4, np.float32)},
}


@pytest.mark.parametrize("message", BAD)
def test_tensors_that_do_not_fit_are_refused_before_they_are_read(message):
    inputs = [np.ones((2, 8), np.float32), pack_weight(np.ones((40, 8), np.int8)), np.ones(40, np.float32)]
    inputs += [None, None, None]
    for index, array in BAD[message].items():
        inputs[index] = array
    if message.startswith("packed"):
        inputs[0] = np.ones((2, 9), np.float32)
    with pytest.raises(Exception, match=message):
        run_operator("W8A8Linear", inputs, {"outputs": 40, "gate": 0, "epsilon": 0.0}, level=LEVELS[0])
