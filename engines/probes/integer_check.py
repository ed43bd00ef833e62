"""Is an integer matmul exact on this CPU? x86 kernels without VNNI add pairs of products in 16 bits and can saturate.

A small Q/DQ graph, fused as the verifier's linears are, multiplies rows and columns of extreme values; every sum is
below 2^24, so float32 holds the exact answer.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quasar.numerics import QMAX

INPUT, OUTPUT = "values", "sums"
_ROWS, _INPUTS, _COLUMNS = 16, 512, 64


def check_weights() -> NDArray[np.int8]:
    """int8 [512, 64]: columns of ±127, alternating signs, runs, and random values."""
    random = np.random.default_rng(7)
    weights = random.integers(-QMAX, QMAX + 1, (_INPUTS, _COLUMNS)).astype(np.int8)
    index = np.arange(_INPUTS)
    for column, pattern in enumerate(_patterns(index)):
        weights[:, column] = pattern
    return weights


def check_inputs() -> NDArray[np.int8]:
    """int8 [16, 512]: the same patterns as rows."""
    random = np.random.default_rng(8)
    inputs = random.integers(-QMAX, QMAX + 1, (_ROWS, _INPUTS)).astype(np.int8)
    for row, pattern in enumerate(_patterns(np.arange(_INPUTS))):
        inputs[row] = pattern
    return inputs


def integers_are_exact(multiply: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> bool:
    """Run the check graph at widths 1, 2, 3, 8 and 16 and compare every sum with numpy's int64.

    `multiply`: runs the graph, rows float32 [T, 512] → sums float32 [T, 64].
    """
    inputs = check_inputs()
    expected = inputs.astype(np.int64) @ check_weights().astype(np.int64)
    for width in (1, 2, 3, 8, _ROWS):
        for start in range(0, _ROWS, width):
            sums = multiply(inputs[start : start + width].astype(np.float32))
            if not np.array_equal(sums.astype(np.int64), expected[start : start + width]):
                return False
    return True


def _patterns(index: NDArray[np.int_]) -> list[NDArray[np.int8]]:
    sign = np.where(index % 2, -1, 1)
    runs = np.where(index // 4 % 2, -1, 1)
    return [
        pattern.astype(np.int8)
        for pattern in (
            np.full(_INPUTS, QMAX),
            np.full(_INPUTS, -QMAX),
            QMAX * sign,
            -QMAX * sign,
            QMAX * runs,
            np.where(index % 3 == 0, QMAX, 1),
            np.where(index == 0, QMAX, 0),
        )
    ]
