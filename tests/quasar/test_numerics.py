"""INT8 arithmetic against ONNX's own reference implementation, exactly; 4-bit weights by what is said of them."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator

from quasar.numerics import (
    AMAX_FLOOR,
    BLOCK,
    QuantizedWeight,
    dequantize_tokens,
    dequantize_weight,
    nibble_scales_of,
    quantize_nibbles,
    quantize_tokens,
    quantize_weight,
    split,
    stored_nibble_scales,
)

finite = st.floats(-1000, 1000, width=32)
matrices = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=finite)


def onnx_reference(op_type, inputs, **attributes):
    names = [f"i{place}" for place in range(len(inputs))]
    node = onnx.helper.make_node(op_type, names, ["o"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in zip(names, inputs, strict=True)
        ],
        [onnx.helper.make_tensor_value_info("o", 0, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))[0]


@given(matrices)
@example(np.array([[1e-45], [-2.7e-43]], np.float32))
def test_weights_round_as_quantize_linear_does(weight):
    quantized = quantize_weight(weight)
    zeros = np.zeros(len(weight), np.int8)
    expected = onnx_reference("QuantizeLinear", [weight, quantized.scale, zeros], axis=0)
    np.testing.assert_array_equal(quantized.values, expected)
    back = onnx_reference("DequantizeLinear", [quantized.values, quantized.scale, zeros], axis=0)
    np.testing.assert_array_equal(dequantize_weight(quantized), back)


@given(matrices)
def test_tokens_round_as_the_graph_does(rows):
    values, amax = quantize_tokens(rows)
    step, zero = np.float32(1) / np.float32(127), np.zeros((), np.int8)
    expected = onnx_reference("QuantizeLinear", [rows / amax, step, zero])
    np.testing.assert_array_equal(values, expected)


def test_every_integer_survives():
    values = np.arange(-127, 128, dtype=np.int8)
    weight = QuantizedWeight(values=values[None], scale=np.array([0.037], np.float32))
    again = quantize_weight(dequantize_weight(weight))
    np.testing.assert_array_equal(again.values[0], values)


def test_ties_go_to_even():
    rows = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    assert quantize_weight(rows).values.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_extremes_use_the_symmetric_range():
    values = quantize_weight(np.array([[-3, 3, 0.01]], np.float32)).values
    assert values.tolist() == [[-127, 127, 0]]


@pytest.mark.parametrize("quantize", [lambda x: quantize_weight(x).values, lambda x: quantize_tokens(x)[0]])
def test_rows_of_zeros(quantize):
    assert not quantize(np.zeros((2, 4), np.float32)).any()


def test_rows_below_the_floor_are_not_blown_up():
    values, amax = quantize_tokens(np.full((1, 3), AMAX_FLOOR / 1000, np.float32))
    assert amax.item() == AMAX_FLOOR
    assert not values.any()


@given(matrices)
def test_error_is_at_most_half_a_step(rows):
    values, amax = quantize_tokens(rows)
    # Half a step, and what float32 rounds in the division and the two products.
    bound = amax * (0.5 / 127 + 3e-7)
    assert (np.abs(dequantize_tokens(values, amax) - rows) <= bound).all()


def test_a_row_does_not_depend_on_its_neighbours():
    rows = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    whole, _ = quantize_tokens(rows)
    for place in range(5):
        np.testing.assert_array_equal(quantize_tokens(rows[place : place + 1])[0][0], whole[place])


@pytest.mark.parametrize("group", [BLOCK, 4 * BLOCK])
def test_four_bits(group):
    random = np.random.default_rng(5)
    weight = (random.standard_normal((40, 256)) * 10.0 ** random.integers(-2, 3, (40, 1))).astype(np.float32)
    weight[3], weight[4, :group] = 0, 0
    quantized = quantize_nibbles(weight, group)
    values, scale = quantized.values, quantized.scale
    # Both kinds of arrays, bit for bit; scales are numbers of 16 bits.
    tensor = torch.from_numpy(weight)
    np.testing.assert_array_equal(nibble_scales_of(tensor, group).numpy(), scale)
    np.testing.assert_array_equal(scale.astype(np.float16), scale)
    assert values.min() >= -8
    assert values.max() <= 7
    groups, integers = split(weight, 256 // group), split(values, 256 // group)
    largest = np.abs(groups).argmax(-1)[..., None]
    zero = np.abs(groups).max(-1) == 0
    # The largest of a group becomes -8, whatever its sign.
    np.testing.assert_array_equal(np.take_along_axis(integers, largest, -1)[..., 0], np.where(zero, 0, -8))
    assert (scale[zero] == 1).all()
    error = np.abs(integers * scale[..., None].astype(np.float64) - groups)
    # Half a step, a whole one beyond 7; scales lose 2^-11 of themselves to float16, of which there are eight.
    step = np.abs(scale)[..., None].astype(np.float64)
    beyond = groups / scale[..., None] > 7
    assert (error <= np.where(beyond, 1, 0.5) * step * (1 + 2.0**-7)).all()


def test_the_smallest_and_the_largest_scales_of_four_bits():
    x = np.array([0, 1e-12, -1e-12, 1e9, -1e9, 0.1], np.float32)
    stored = stored_nibble_scales(x)
    np.testing.assert_array_equal(stored[:5], np.array([2.0**-24, 2.0**-24, 2.0**-24, 65504, -65504], np.float32))
    np.testing.assert_array_equal(stored_nibble_scales(torch.from_numpy(x)).numpy(), stored)
    assert stored[5] == np.float32(np.float16(0.1))
