"""sample_token: one token drawn from a row of logits, with randomness that depends on (seed, position, token) alone.

Gumbel-max (Gumbel 1954; Maddison et al., A* sampling, 2014): the token with the largest logit / temperature + noise
has the softmax's distribution. The noise of a token at a position is the same whoever draws, so two models that share a
seed agree as often as their distributions allow: at least (1 - TV) / (1 + TV) (Daliri, Musco, Suresh 2024).

Noise is -log(-log(u)) with u = (r + 1/2) / 2^64 and 64 random bits r from Philox4x64-10 (Salmon et al. 2011) under the
key (seed, 1): the upper 16 bits of token i are the i-th 16 bits of the stream at counter (0, position, 0, 0), the lower
48 those of the first word at (i, position, 1, 0). Few tokens need the lower ones.

Filters are those of transformers, in its order: temperature, top_k (ties with the k-th stay), top_p on what top_k left,
min_p relative to the largest.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quasar.errors import GenerationError

# Recorded in an engine's manifest: another method, or another version of this one, draws other tokens.
SAMPLER = "gumbel-max philox4x64-10 v1"

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_KEY = 1
_HIGH_STREAM, _LOW_STREAM = 0, 1
_HIGH_VALUES = 1 << 16
_SLACK = np.float32(1e-3)
# How far below the largest scaled logit the tokens of a nucleus are looked for at first.
_REACH = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What is left to draw from: `temperature` > 0; `top_k` 0, `top_p` 1 and `min_p` 0 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def sample_token(logits: Float32, filters: Filters, *, seed: int, position: int) -> int:
    """The token drawn for `position` from logits float32 [V]; -inf excludes a token.

    Raises:
        GenerationError: a logit is NaN or infinite, or every token is excluded.
    """
    largest = _largest(logits)
    within = _kth_largest(logits, filters.top_k)
    floor = max(within, _min_p_floor(largest, filters))
    candidates: Int64 = (
        np.flatnonzero(logits.astype(np.float64) >= floor) if floor > -np.inf else np.arange(len(logits))
    )
    if filters.top_p < 1:
        nucleus = _nucleus(logits, largest, within, filters)
        candidates = np.sort(nucleus[logits[nucleus].astype(np.float64) >= floor])
    return _winner(logits, largest, filters.temperature, candidates, seed, position)


def distribution(logits: Float32, filters: Filters) -> Float64:
    """What `sample_token` draws from, float64 [V]: the filtered softmax, by its definition."""
    largest = _largest(logits)
    wide = logits.astype(np.float64)
    mass = np.exp((wide - largest) / filters.temperature)
    mass[wide < _kth_largest(logits, filters.top_k)] = 0
    if filters.top_p < 1:
        order = np.argsort(-wide, kind="stable")
        ahead = np.cumsum(mass[order]) - mass[order]
        mass[order[ahead >= filters.top_p * mass.sum()]] = 0
    mass[wide < _min_p_floor(largest, filters)] = 0
    result: Float64 = mass / mass.sum()
    return result


def gumbel_noise(tokens: Int64, *, seed: int, position: int) -> Float64:
    """The noise of tokens int64 [n] at a position: float64 [n]."""
    if not len(tokens):
        return np.empty(0)
    high = _high_bits(int(tokens.max()) + 1, seed, position)
    return _noise(tokens, high, seed, position)


def _largest(logits: Float32) -> float:
    largest = float(logits.max())
    if not np.isfinite(largest):
        if largest == -np.inf:
            raise GenerationError("every token is excluded: a bias, a hook or a minimum leaves nothing to choose from")
        raise GenerationError("the logits are not numbers: NaN or infinity came from the engine or a hook")
    return largest


def _kth_largest(logits: Float32, top_k: int) -> float:
    if not 0 < top_k < len(logits):
        return -np.inf
    return float(np.partition(logits, len(logits) - top_k)[len(logits) - top_k])


def _min_p_floor(largest: float, filters: Filters) -> float:
    return largest + filters.temperature * float(np.log(filters.min_p)) if filters.min_p > 0 else -np.inf


def _stream(seed: int, first: int, position: int, stream: int) -> np.random.Philox:
    return np.random.Philox(
        key=np.array([seed, _KEY], np.uint64), counter=np.array([first, position, stream, 0], np.uint64)
    )


def _high_bits(count: int, seed: int, position: int) -> NDArray[np.uint16]:
    words = _stream(seed, 0, position, _HIGH_STREAM).random_raw(-(-count // 4))
    bits: NDArray[np.uint16] = words.astype("<u8").view("<u2")[:count]
    return bits


def _nucleus(logits: Float32, largest: float, within: float, filters: Filters) -> Int64:
    """The tokens that top_p keeps of those of at least `within`; only the likely ones are sorted."""
    scaled = (logits - np.float32(largest)) * np.float32(1 / filters.temperature)
    mass = np.exp(scaled)
    mass[logits < within] = 0
    needed = filters.top_p * float(mass.sum(dtype=np.float64))
    reach = _REACH
    while True:
        likely = np.flatnonzero(scaled >= -reach)
        if len(likely) == len(logits) or mass[likely].sum(dtype=np.float64) >= needed:
            break
        reach *= 2
    order: Int64 = likely[np.argsort(-logits[likely], kind="stable")]
    cumulative = np.cumsum(mass[order], dtype=np.float64)
    kept: Int64 = order[cumulative - mass[order] < needed]
    return kept


def _winner(logits: Float32, largest: float, temperature: float, candidates: Int64, seed: int, position: int) -> int:
    """The candidate with the largest scaled logit + noise; the lowest id of a tie."""
    high = _high_bits(len(logits), seed, position)
    least, most = _bounds()
    bits = high[candidates]
    rough = (logits[candidates] - np.float32(largest)) * np.float32(1 / temperature)
    # The slack covers float32's rounding of whatever can still win.
    near = candidates[rough + most[bits] >= (rough + least[bits]).max() - _SLACK]
    exact = (logits[near].astype(np.float64) - largest) / temperature
    return int(near[np.argmax(exact + _noise(near, high, seed, position))])


def _noise(tokens: Int64, high: NDArray[np.uint16], seed: int, position: int) -> Float64:
    low = [int(_stream(seed, token, position, _LOW_STREAM).random_raw()) >> 16 for token in tokens.tolist()]
    bits = (high[tokens].astype(np.uint64) << np.uint64(48)) | np.array(low, np.uint64)
    # Near 1 a double has no room for u; 1 - u is as exact as u is near 0.
    upper = bits >= np.uint64(1 << 63)
    u = (bits.astype(np.float64) + 0.5) * 2.0**-64
    rest = ((~bits).astype(np.float64) + 0.5) * 2.0**-64
    exponential = -np.where(upper, np.log1p(-np.where(upper, rest, 0.5)), np.log(np.where(upper, 0.5, u)))
    noise: Float64 = -np.log(exponential)
    return noise


@functools.cache
def _bounds() -> tuple[Float32, Float32]:
    """The least and the most that the noise can be for each upper 16 bits."""
    edges = np.arange(_HIGH_VALUES + 1) / _HIGH_VALUES
    noise = np.full(len(edges), np.inf)
    noise[0] = -np.inf
    noise[1:-1] = -np.log(-np.log(edges[1:-1]))
    return noise[:-1].astype(np.float32), noise[1:].astype(np.float32)
