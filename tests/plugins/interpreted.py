"""The Triton kernels in Triton's interpreter, against their references. Run by test_gpu_kernels.py, since Triton's own
functions are interpreted only in a process that says so before it imports Triton."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plugins.gpu import integer_linear as linear_kernel
from plugins.gpu import kv_compact as kv_compact_kernel
from plugins.gpu import quantize_per_token as quantize_kernel
from plugins.gpu.interpreter import interpret
from plugins.gpu.packing import TILE_OUTPUTS, pack_weight, tiles_of
from plugins.integer_linear import integer_linear
from plugins.kv_compact import kv_compact, launch_arguments
from plugins.quantize_per_token import quantize_per_token

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(
    heads=st.integers(1, 3),
    head_size=st.sampled_from([2, 6, 16, 64, 96, 128, 256, 258, 514]),
    length=st.integers(0, 30),
    path=st.sets(st.integers(0, 31), max_size=32),
    layers=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@example(heads=1, head_size=64, length=0, path=set(), layers=1, seed=0)
@example(heads=2, head_size=64, length=5, path=set(range(32)), layers=2, seed=0)
def test_kv_compact(heads, head_size, length, path, layers, seed):
    random, capacity, rows = np.random.default_rng(seed), 64, np.array(sorted(path), np.int64)
    caches = [random.integers(0, 1 << 16, (heads, capacity, head_size)).astype(np.uint16) for _ in range(2 * layers)]
    tensors = [torch.from_numpy(cache.view(np.int16).copy()) for cache in caches]
    grid, args = launch_arguments(
        0,
        0,
        num_caches=len(caches),
        num_heads=heads,
        capacity=capacity,
        position_bytes=2 * head_size,
        cache_length=length,
        path_length=len(rows),
    )
    table = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    # An empty tensor has no address; the kernel does not read it then.
    path_tensor = torch.from_numpy(rows) if len(rows) else torch.zeros(1, dtype=torch.int64)
    interpret(kv_compact_kernel.KERNEL, grid, [table, path_tensor, *args[2:]])
    kv_compact(caches, length, rows)
    for cache, tensor in zip(caches, tensors, strict=True):
        np.testing.assert_array_equal(cache, tensor.numpy().view(np.uint16))


@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(
    x_type=st.sampled_from(sorted(TYPES)),
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 3, 63, 64, 100, 576, 1023, 1024, 1025, 1536, 2049]),
    padding=st.sampled_from([0, 1, 7, 64]),
    exponent=st.integers(-6, 4),
    seed=st.integers(0, 2**31),
)
def test_quantize_per_token(x_type, rows, columns, padding, exponent, seed):
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns + padding)) * 10.0**exponent
    values[random.random(values.shape) < 0.1] = 0
    # Ties: multiples of half a step of a row whose amax is 127.
    values[0] = np.clip(np.round(values[0] / 10.0**exponent * 60) / 2, -126, 126)
    values[0, 0] = 127
    padded = torch.from_numpy(values).to(TYPES[x_type])
    q, a = torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows)
    interpret(quantize_kernel.KERNELS["float32"], (rows,), [padded, columns, columns + padding, q, a])
    expected_q, expected_a = quantize_per_token(padded[:, :columns].float().numpy())
    np.testing.assert_array_equal(q.numpy(), expected_q)
    np.testing.assert_array_equal(a.numpy(), expected_a)


@settings(deadline=None, max_examples=25, database=None, derandomize=True)
@given(
    tokens=st.integers(1, 70),
    outputs=st.sampled_from([2, 64, 66, 130]),
    inputs=st.sampled_from([16, 128, 144, 304]),
    seed=st.integers(0, 2**31),
)
@example(tokens=33, outputs=66, inputs=304, seed=0)
def test_integer_linear(tokens, outputs, inputs, seed):
    random = np.random.default_rng(seed)
    q = random.integers(-128, 128, (tokens, inputs)).astype(np.int8)
    values = random.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    values[0], q[-1] = 127, 127
    a, scale, bias = (random.uniform(-1, 1, extent).astype(np.float32) for extent in (tokens, outputs, outputs))
    packed = np.ascontiguousarray(pack_weight(values))
    # What lies after the last row must not count, and no output may be left or written past the end.
    rows = np.concatenate([q.reshape(-1), np.full(128, 99, np.int8)])
    y = torch.full((tokens * outputs + 64,), np.nan)
    interpret(
        linear_kernel.KERNEL,
        (tiles_of(tokens, linear_kernel.TOKENS), tiles_of(outputs, TILE_OUTPUTS)),
        [*map(torch.from_numpy, (rows, a, packed, scale, bias)), tokens, inputs, outputs, y],
    )
    assert torch.isnan(y[tokens * outputs :]).all()
    expected = integer_linear(q, a[:, None], packed, scale, bias)
    np.testing.assert_array_equal(y[: tokens * outputs].reshape(tokens, outputs), expected)
