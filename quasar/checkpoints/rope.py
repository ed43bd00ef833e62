"""Rotary frequencies and the cos/sin tables, computed in float32 as models were trained with them.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), and the scaling that Llama 3.1 introduced.
"""

import math

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.spec import Rope

Float32 = NDArray[np.float32]


def inverse_frequencies(rope: Rope, head_size: int) -> Float32:
    """Angle per position of each rotated pair: float32 [rotary size / 2]."""
    head_size = rope.rotated(head_size)
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    theta = np.full(exponents.shape, rope.theta, np.float32)
    base = np.reciprocal(np.power(theta, exponents)).astype(np.float32)
    match rope.kind:
        case "default":
            scaled: Float32 = base
        case "linear":
            scaled = base / np.float32(rope.factor)
        case "divided":
            scaled = base / np.asarray(rope.divisors, np.float32)
        case "llama3":
            scaled = _llama3(base, rope)
        case "yarn":
            scaled = _yarn(base, rope, head_size)
    return scaled.astype(np.float32)


def attention_scaling(rope: Rope) -> float:
    """Factor on cos and sin: 1 unless the config says otherwise; YaRN's is `0.1 ln(factor) + 1`."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind != "yarn":
        return 1.0
    return 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0


def cos_sin_tables(rope: Rope, head_size: int, num_positions: int) -> tuple[Float32, Float32]:
    """Cos and sin tables, each float32 [num_positions, rotary size / 2], with the attention scaling applied."""
    positions = np.arange(num_positions, dtype=np.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_size)[None, :]
    scaling = np.float32(attention_scaling(rope))
    return np.cos(angles) * scaling, np.sin(angles) * scaling


def _llama3(base: Float32, rope: Rope) -> Float32:
    """Divide long wavelengths by `factor`, keep short ones, and blend in between."""
    wavelength = 2 * np.float32(math.pi) / base
    low = rope.original_context_length / rope.low_freq_factor
    high = rope.original_context_length / rope.high_freq_factor
    blend = (rope.original_context_length / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * base / rope.factor + blend * base
    scaled: Float32 = np.where(wavelength > low, base / rope.factor, np.where(wavelength < high, base, between))
    return scaled


def _yarn(base: Float32, rope: Rope, head_size: int) -> Float32:
    """Interpolate slow pairs, keep fast ones; the ramp lies between `beta_slow` and `beta_fast` rotations."""

    def pair_with_rotations(rotations: float) -> float:
        span = rope.original_context_length / (rotations * 2 * math.pi)
        return head_size * math.log(span) / (2 * math.log(rope.theta))

    low, high = pair_with_rotations(rope.beta_fast), pair_with_rotations(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    # An empty ramp would divide by zero; a thousandth of a pair makes it a step.
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(head_size // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    scaled: Float32 = base / np.float32(rope.factor) * ramp + base * (1 - ramp)
    return scaled
