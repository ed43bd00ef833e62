"""GGUF's blocks of weights as integers and scales: each 32 inputs have a scale, and some types an offset.

Types with a scale for every 16 inputs (Q6_K, Q3_K, Q2_K) are not among them, nor are those that look their values up
(IQ, TQ).
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.numerics import BLOCK, Float32, Int8

Bytes = NDArray[np.uint8]
# Of blocks uint8 [blocks, bytes], G scales in each: values int8 [blocks, 32 G], scales and offsets float32 [blocks, G].
_Parts = tuple[Int8, Float32, Float32 | None]

# Rows that are taken apart at a time.
_BYTES_AT_ONCE = 1 << 20


def _half(block: Bytes, at: int) -> Float32:
    """The float16 that stands there: [blocks, 1]."""
    numbers: Float32 = np.ascontiguousarray(block[:, at : at + 2]).view("<f2").astype(np.float32)
    return numbers


def _nibbles(pairs: Bytes) -> Bytes:
    """[blocks, 16] → [blocks, 32]: the lower halves first."""
    return np.concatenate([pairs & 15, pairs >> 4], axis=1)


def _fifth_bits(words: Bytes) -> Bytes:
    """[blocks, 4] → [blocks, 32]: 16 or 0."""
    return np.unpackbits(words, axis=1, bitorder="little") << np.uint8(4)


def _q8_0(block: Bytes) -> _Parts:
    return block[:, 2:].view(np.int8), _half(block, 0), None


def _q4_0(block: Bytes) -> _Parts:
    return _nibbles(block[:, 2:]).view(np.int8) - np.int8(8), _half(block, 0), None


def _q5_0(block: Bytes) -> _Parts:
    values = _nibbles(block[:, 6:]) | _fifth_bits(block[:, 2:6])
    return values.view(np.int8) - np.int8(16), _half(block, 0), None


def _q4_1(block: Bytes) -> _Parts:
    return _nibbles(block[:, 4:]).view(np.int8), _half(block, 0), _half(block, 2)


def _six_bits(block: Bytes) -> tuple[Float32, Float32]:
    """The eight scales and eight minima of a super-block, [blocks, 8] each, from the 12 bytes after its two factors."""
    first, second, third = (block[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _super_block(block: Bytes, values: Bytes) -> _Parts:
    scales, minima = _six_bits(block)
    return values.view(np.int8), _half(block, 0) * scales, -_half(block, 2) * minima


def _pairs_of_groups(pairs: Bytes) -> Bytes:
    """[blocks, 128] → [blocks, 256]: of each 32 bytes the lower halves, and then the upper ones."""
    chunks = pairs.reshape(len(pairs), 4, BLOCK)
    return np.stack([chunks & 15, chunks >> 4], axis=2).reshape(len(pairs), -1)


def _q4_k(block: Bytes) -> _Parts:
    return _super_block(block, _pairs_of_groups(block[:, 16:]))


def _q5_k(block: Bytes) -> _Parts:
    bits = block[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    fifth = (bits.reshape(len(block), -1) << 4).astype(np.uint8)
    return _super_block(block, _pairs_of_groups(block[:, 48:]) | fifth)


# By gguf's name of a tensor's type: bytes of a block, and how it is taken apart.
_TYPES: Mapping[str, tuple[int, Callable[[Bytes], _Parts]]] = {
    "Q8_0": (34, _q8_0),
    "Q5_0": (22, _q5_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
}


def prequantized_blocks(name: str, rows: Bytes) -> PrequantizedWeight | None:
    """A tensor of bytes [outputs, …] of gguf's type `name`; None for a type whose grid is another."""
    if name not in _TYPES:
        return None
    size, take_apart = _TYPES[name]
    step = max(1, _BYTES_AT_ONCE // rows.shape[1])
    values, scales, offsets = [], [], []
    for start in range(0, len(rows), step):
        part, scale, offset = take_apart(np.ascontiguousarray(rows[start : start + step]).reshape(-1, size))
        values.append(part)
        scales.append(scale)
        if offset is not None:
            offsets.append(offset)
    return PrequantizedWeight(
        values=np.concatenate(values).reshape(len(rows), -1),
        scale=np.concatenate(scales).reshape(len(rows), -1),
        offset=np.concatenate(offsets).reshape(len(rows), -1) if offsets else None,
        form=name,
    )
