"""INT8 arithmetic against ONNX's own reference implementation, exactly."""

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator

from quasar.numerics import (
    AMAX_FLOOR,
    QuantizedWeight,
    dequantize_tokens,
    dequantize_weight,
    quantize_tokens,
    quantize_weight,
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
