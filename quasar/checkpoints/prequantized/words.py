"""Integers of 4 or 8 bits in 32-bit words, the first one in the lowest bits: how layouts of safetensors pack them."""

import numpy as np
from numpy.typing import NDArray

BITS = (4, 8)


def unpacked(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Words [..., W] → the unsigned integers that they hold, uint8 [..., 32 W / bits]."""
    in_bytes = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return in_bytes
    pairs = np.empty((*in_bytes.shape, 2), np.uint8)
    np.bitwise_and(in_bytes, 15, out=pairs[..., 0])
    np.right_shift(in_bytes, 4, out=pairs[..., 1])
    return pairs.reshape(*in_bytes.shape[:-1], -1)


def centred(values: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Unsigned integers less half of their range: from -8 to 7, or -128 to 127."""
    less: NDArray[np.int8] = (values ^ np.uint8(0x80)).view(np.int8) if bits == 8 else values.view(np.int8) - np.int8(8)
    return less
