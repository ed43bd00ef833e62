"""integer_linear: a W8A8 linear of tokens that `quantize_per_token` has quantized."""

import numpy as np
from numpy.typing import NDArray

from plugins.gpu.packing import unpack_weight
from quasar.numerics import UNIT_STEP

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]


def integer_linear(q: Int8, a: Float32, weight: Int8, scale: Float32, bias: Float32) -> Float32:
    """The reference: y float32 [..., N] of q int8 [..., K], a float32 [..., 1], and scale and bias float32 [N].

    `weight`: int8 [N / 64, K / 128, 64, 128] (`plugins.gpu.packing`). Sums are exact; after them each operation rounds
    to float32 in this order: · (1/127 · scale), · a, + bias.
    """
    values = unpack_weight(weight, len(scale), q.shape[-1])
    # A float64 holds every sum of up to 2^38 products.
    sums = (q.astype(np.float64) @ values.T.astype(np.float64)).astype(np.float32)
    y: Float32 = sums * (np.float32(UNIT_STEP) * scale) * a + bias
    return y
