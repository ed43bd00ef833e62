"""quantize_per_token: the activations of a W8A8 linear, row amax and INT8 quantization in one pass."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# The smallest normal float16, the same floor in every type: a row of zeros is no division by zero.
AMAX_FLOOR = 2.0**-14
QMAX = 127


def quantize_per_token(x: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The reference: q int8 [T, K] and a float32 [T] of x [T, K], as the canonical graph's operators compute them.

    `a` is the row's amax, at least 2^-14; q = round_half_even((x / a) / (1/127)) in float32, saturated.
    """
    values = np.asarray(x).astype(np.float32)
    a = np.maximum(np.abs(values).max(axis=-1), np.float32(AMAX_FLOOR))
    steps = (values / a[..., None]) / np.float32(1 / QMAX)
    return np.clip(np.rint(steps), -128, 127).astype(np.int8), a
