"""quantize_per_token: the activations of a W8A8 linear, row amax and INT8 quantization in one pass."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.numerics import quantize_tokens


def quantize_per_token(x: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The reference: q int8 [T, K] and a float32 [T] of x [T, K], as the canonical graph's operators compute them.

    `a` is the row's amax, at least 2^-14; q = round_half_even((x / a) / (1/127)) in float32, saturated.
    """
    q, a = quantize_tokens(np.asarray(x).astype(np.float32))
    return q, a[..., 0]
