"""External data: what is appended is what a graph reads, on a page of its own."""

import ml_dtypes
import numpy as np
import pytest

from export.weight_file import ALIGNMENT, WeightFile


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (1, 1), (7,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.bfloat16])
def test_what_is_appended_is_what_is_read(tmp_path, shape, dtype):
    random = np.random.default_rng(1)
    arrays = [random.integers(-8 if dtype != np.uint8 else 0, 8, shape).astype(dtype) for _ in range(3)]
    # Weights come as transposed views.
    arrays.append(arrays[0].T)
    with WeightFile(tmp_path / "weights.data") as file:
        tensors = [file.append(f"tensor.{place}", array) for place, array in enumerate(arrays)]
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.offset % ALIGNMENT == 0
        assert tuple(tensor.shape.numpy()) == array.shape
        assert tensor.numpy().dtype == dtype
        np.testing.assert_array_equal(tensor.numpy().astype(np.float32), array.astype(np.float32))
    assert tensors[0].length == (-(-arrays[0].size // 2) if dtype == ml_dtypes.int4 else arrays[0].nbytes)
