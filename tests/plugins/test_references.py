"""The numpy references against standard ONNX operators, and the registry."""

import importlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from engines.tree import ancestor_mask, depths
from plugins import OPERATORS, operator
from plugins.gpu.packing import pack_weight
from plugins.integer_linear import integer_linear
from plugins.kv_compact import kv_compact, launch_arguments
from plugins.quantize_per_token import quantize_per_token
from plugins.verify_attention import verify_attention
from plugins.w8a8_linear import GELU, SILU, gelu_tanh, quantize_rows, silu, w8a8_block_linear, w8a8_linear
from quasar.errors import QuasarError
from quasar.numerics import AMAX_FLOOR, quantize_tokens


def test_the_registry_names_what_there_is():
    native = ["W8A8Linear", "W8A8BlockLinear", "W4A8BlockLinear", "W4A16BlockLinear", "VerifyAttention"]
    assert list(OPERATORS) == ["kv_compact", "quantize_per_token", "integer_linear", *native, "sample_token"]
    for name, one in OPERATORS.items():
        assert operator(name) is one
        module = importlib.import_module(one.implementations["cpu"])
        assert hasattr(
            module, {**dict.fromkeys(native, "find_library"), "sample_token": "NativeSampler"}.get(name, name)
        )
        if "cuda" in one.implementations:
            module = importlib.import_module(one.implementations["cuda"])
            assert hasattr(module, "KERNEL") or hasattr(module, "KERNELS")
    with pytest.raises(QuasarError, match="no operator 'gather'; known are kv_compact, quantize_per_token"):
        operator("gather")


def standard_operators():
    """The per-token quantization of the canonical graph, in standard operators."""
    step, zero, floor, axes = "step", "zero", "floor", "axes"
    nodes = [
        helper.make_node("Abs", ["x"], ["magnitude"]),
        helper.make_node("ReduceMax", ["magnitude", axes], ["largest"], keepdims=1),
        helper.make_node("Clip", ["largest", floor], ["a"]),
        helper.make_node("Div", ["x", "a"], ["unit"]),
        helper.make_node("QuantizeLinear", ["unit", step, zero], ["q"]),
    ]
    constants = [
        helper.make_tensor(step, TensorProto.FLOAT, [], [1 / 127]),
        helper.make_tensor(zero, TensorProto.INT8, [], [0]),
        helper.make_tensor(floor, TensorProto.FLOAT, [], [AMAX_FLOOR]),
        helper.make_tensor(axes, TensorProto.INT64, [1], [-1]),
    ]
    graph = helper.make_graph(
        nodes,
        "per_token",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "K"])],
        [
            helper.make_tensor_value_info("q", TensorProto.INT8, ["T", "K"]),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["T", 1]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(-6, 5), st.integers(0, 2**31))
def test_quantize_per_token_is_what_the_graph_computes(rows, columns, exponent, seed):
    random = np.random.default_rng(seed)
    x = (random.standard_normal((rows, columns)) * 10.0**exponent).astype(np.float32)
    x[random.random(x.shape) < 0.1] = 0
    q, a = quantize_per_token(x)
    expected_q, expected_a = STANDARD.run(None, {"x": x})
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(a, expected_a[:, 0])
    calibrated, amax = quantize_tokens(x)
    np.testing.assert_array_equal(q, calibrated)
    np.testing.assert_array_equal(a, amax[:, 0])


STANDARD = standard_operators()


def test_a_row_of_zeros_is_no_division_by_zero():
    q, a = quantize_per_token(np.zeros((2, 5), np.float16))
    assert not q.any()
    np.testing.assert_array_equal(a, np.float32(AMAX_FLOOR))


@settings(deadline=None)
@given(st.data())
def test_kv_compact_keeps_the_path_and_nothing_else_moves(data):
    capacity, length = data.draw(st.integers(8, 40)), data.draw(st.integers(0, 7))
    path = sorted(data.draw(st.sets(st.integers(0, capacity - length - 1), max_size=8)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    caches = [random.standard_normal((2, capacity, 4)).astype(np.float16) for _ in range(3)]
    before = [cache.copy() for cache in caches]
    kv_compact(caches, length, path)
    for cache, old in zip(caches, before, strict=True):
        for place, row in enumerate(path):
            np.testing.assert_array_equal(cache[:, length + place], old[:, length + row])
        np.testing.assert_array_equal(cache[:, :length], old[:, :length])
        np.testing.assert_array_equal(cache[:, length + len(path) :], old[:, length + len(path) :])


@pytest.mark.parametrize("path", [[1, 1], [2, 1], [-1, 0], [[0, 1]]])
def test_paths_ascend(path):
    with pytest.raises(QuasarError, match="ascending"):
        kv_compact([np.zeros((1, 8, 2))], 0, path)


def test_positions_are_moved_in_words():
    grid, args = launch_arguments(
        1, 2, num_caches=6, num_heads=3, capacity=64, position_bytes=640, cache_length=7, path_length=4
    )
    assert grid == (6, 3, 2)
    assert args == [1, 2, 7, 4, 64, 160]
    with pytest.raises(QuasarError, match="position of 6 bytes"):
        launch_arguments(1, 2, num_caches=6, num_heads=3, capacity=64, position_bytes=6, cache_length=7, path_length=4)


def evaluate(nodes, feed, output):
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feed.items()
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return ReferenceEvaluator(model).run([output], feed)[0]


def test_w8a8_linear_is_the_canonical_linear():
    random = np.random.default_rng(0)
    x, values = random.standard_normal((7, 50), np.float32), random.integers(-127, 128, (20, 50)).astype(np.int8)
    scale = random.uniform(0.01, 0.1, 20).astype(np.float32)
    q, a = quantize_tokens(x)
    ours, amax = quantize_rows(x)
    same, largest = quantize_per_token(x)
    np.testing.assert_array_equal(ours, same)
    np.testing.assert_array_equal(amax, largest)
    np.testing.assert_array_equal(ours, q)
    np.testing.assert_array_equal(amax, np.asarray(a).reshape(-1))
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "step"], ["activations"]),
        helper.make_node("DequantizeLinear", ["w", "scale"], ["weights"], axis=1),
        helper.make_node("MatMul", ["activations", "weights"], ["product"]),
        helper.make_node("Mul", ["product", "a"], ["y"]),
    ]
    feed = {"q": q, "step": np.float32(1 / 127).reshape(()), "w": values.T.copy(), "scale": scale, "a": amax[:, None]}
    # The standard form sums dequantized products in float32; the reference sums integers.
    np.testing.assert_allclose(w8a8_linear(x, values, scale), evaluate(nodes, feed, "y"), rtol=1e-4, atol=1e-4)


def test_a_linear_is_its_quantization_and_an_integer_linear():
    random = np.random.default_rng(3)
    x = random.standard_normal((5, 200)).astype(np.float32)
    values = random.integers(-127, 128, (70, 200)).astype(np.int8)
    scale, bias = random.uniform(1e-4, 1e-2, 70).astype(np.float32), random.standard_normal(70).astype(np.float32)
    q, a = quantize_per_token(x)
    y = integer_linear(q, a[:, None], pack_weight(values), scale, bias)
    np.testing.assert_array_equal(y, w8a8_linear(x, values, scale, bias=bias))


def test_a_block_linear_with_one_block_is_a_linear():
    random = np.random.default_rng(1)
    x, values = random.standard_normal((5, 32), np.float32), random.integers(-127, 128, (9, 32)).astype(np.int8)
    scale = random.uniform(0.01, 0.1, 9).astype(np.float32)
    np.testing.assert_allclose(w8a8_block_linear(x, values, scale[:, None]), w8a8_linear(x, values, scale), rtol=1e-6)


def test_verify_attention_is_the_canonical_attention():
    """RotaryEmbedding, a scattered cache, and Attention with the mask of the token's path, in standard operators."""
    random = np.random.default_rng(2)
    heads, groups, size, length, rows, capacity = 4, 2, 8, 6, 5, 16
    parents = np.array([-1, 0, 0, 2, 1])
    mask, positions = ancestor_mask(parents), length + depths(parents)
    qkv = random.standard_normal((rows, (heads + 2 * groups) * size), np.float32)
    key, value = (random.standard_normal((groups, capacity, size), np.float32) for _ in range(2))
    angles = np.outer(np.arange(capacity), [1.0, 0.3, 0.1, 0.03])
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    split = qkv.reshape(rows, -1, size).transpose(1, 0, 2)[None]
    feed = {
        "q": split[:, :heads].copy(),
        "k": split[:, heads : heads + groups].copy(),
        "positions": positions[None],
        "cos": cos,
        "sin": sin,
    }
    rotated = {
        name: evaluate(
            [helper.make_node("RotaryEmbedding", [name, "cos", "sin", "positions"], ["y"])],
            {key: feed[key] for key in (name, "cos", "sin", "positions")},
            "y",
        )
        for name in "qk"
    }
    keys, values = key.copy()[None], value.copy()[None]
    keys[:, :, length : length + rows] = rotated["k"]
    values[:, :, length : length + rows] = split[:, heads + groups :]
    seen = np.zeros((1, 1, rows, capacity), np.bool_)
    seen[..., :length] = True
    seen[0, 0, :, length : length + rows] = mask
    expected = evaluate(
        [helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])],
        {"q": rotated["q"], "k": keys, "v": values, "mask": seen},
        "y",
    )
    context = verify_attention(qkv, key, value, length, positions, cos, sin, num_heads=heads, tree_mask=mask)
    # The standard operator sums in float32.
    np.testing.assert_allclose(context, expected[0].transpose(1, 0, 2).reshape(rows, -1), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(key[None], keys, atol=1e-6)
    np.testing.assert_array_equal(value[None], values)


def test_gates_are_the_standard_activations():
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    feed = {"x": x}
    gelu = evaluate([helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")], feed, "y")
    # The standard form adds 1 to tanh in float32: half a last place of 1, times x / 2.
    np.testing.assert_allclose(gelu_tanh(x), gelu, atol=4e-7, rtol=3e-7)
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    np.testing.assert_allclose(silu(x), evaluate(nodes, feed, "y"), rtol=4e-7)
    values, scale = np.eye(4, 2, dtype=np.int8) * 127, np.ones(4, np.float32)
    rows = np.array([[1, 0.5]], np.float32)
    # Gates are the first half of the columns, which here are x; ups are their bias.
    for gate, act in ((SILU, silu), (GELU, gelu_tanh)):
        y = w8a8_linear(rows, values, scale, bias=np.array([0, 0, 2, 3], np.float32), gate=gate)
        gates = w8a8_linear(rows, values[:2], scale[:2])
        np.testing.assert_array_equal(y, act(gates) * np.array([2, 3], np.float32))


@pytest.mark.parametrize("groups", [1, 2])
def test_norms_over_whole_rows_and_no_rotation(groups):
    """As if queries and keys came normalized; with tables of no columns they stay as they are."""
    random = np.random.default_rng(4)
    heads, size, length, rows = 4, 8, 3, 5
    qkv = random.standard_normal((rows, (heads + 2 * groups) * size), np.float32)
    weights = [random.uniform(0.5, 1.5, count * size).astype(np.float32) for count in (heads, groups)]
    parts = np.split(qkv, [heads * size, (heads + groups) * size], axis=1)
    norm = [helper.make_node("RMSNormalization", ["x", "w"], ["y"], axis=-1, epsilon=1e-5)]
    normed = [evaluate(norm, {"x": part, "w": weight}, "y") for part, weight in zip(parts, weights, strict=False)]
    key, value = (random.standard_normal((groups, 16, size), np.float32) for _ in range(2))
    caches = [key.copy(), value.copy()]
    positions, tables = np.arange(length, length + rows), [np.empty((1, 0), np.float32)] * 2
    context = verify_attention(
        *(qkv, *caches, length, positions, *tables),
        num_heads=heads,
        q_norm=weights[0],
        k_norm=weights[1],
        epsilon=1e-5,
    )
    split = np.concatenate([*normed, parts[2]], axis=1)
    expected = verify_attention(split, key, value, length, positions, *tables, num_heads=heads)
    # The standard operator sums in float32.
    np.testing.assert_allclose(context, expected, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(caches[0], key, atol=1e-6)
    new = slice(length, length + rows)
    np.testing.assert_array_equal(key[:, new].swapaxes(0, 1).reshape(rows, -1), normed[1])
