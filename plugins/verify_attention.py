"""VerifyAttention: new tokens, a chain or a tree, over a cache; each in the order of its own path.

A batch holds the tokens of several sequences in one row, each with a slot of the cache, a length and a tree of its own.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.w8a8_linear import rms_norm
from quasar.numerics import QMAX

Float32 = NDArray[np.float32]
_FLOAT32 = np.dtype(np.float32)


def verify_attention(
    qkv: Float32,
    key: Float32,
    value: Float32,
    cache_length: int,
    positions: NDArray[np.int64],
    cos: Float32,
    sin: Float32,
    *,
    num_heads: int,
    tree_mask: NDArray[np.bool_] | None = None,
    q_norm: Float32 | None = None,
    k_norm: Float32 | None = None,
    epsilon: float = 0.0,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    cache_dtype: np.dtype[Any] = _FLOAT32,
    cache_scales: tuple[Float32, Float32] | None = None,
    upper_alone: bool = False,
) -> Float32:
    """The reference: context float32 [T, H·D]; keys and values are appended to the caches in place.

    Args:
        qkv: float32 [T, (H + 2G)·D], before norms and rotation.
        key: float32 [G, S, D], rotated; the new positions are written after `cache_length`. `value` alike.
        positions: int64 [T], rows of `cos` and `sin` [positions, R / 2], which rotate the first R values of a head; a
            layer that does not rotate has tables of 0 columns, of which no row is read.
        tree_mask: bool [T, T], token r sees itself and its ancestors; None: a chain.
        q_norm: float32 [D], weight of an RMS norm over each head's vector before rotation; or [H·D], of one over
            all heads together. `k_norm` alike, [D] or [G·D].
        scale: of the scores; None: D^-0.5.
        softcap: scores become softcap · tanh(score / softcap); 0: they stay.
        window: a token sees that many positions of its path, itself included; 0: all.
        cache_dtype: what keys and values are rounded to in the cache: float32, float16 or bfloat16.
        cache_scales: of keys and of values, float32 [G, D] each: the caches hold integers from -127 to 127, each times
            its channel's scale.
        upper_alone: of those integers the upper four bits are read, and the middle of what the others can be.

    Sums are float64 here, so implementations differ by float32 rounding; what is exact about them is that a token's
    bits depend on its own path alone.
    """
    width, (groups, _, size) = len(qkv), key.shape
    heads = qkv.reshape(width, num_heads + 2 * groups, size)
    q, k, v = np.split(heads, [num_heads, num_heads + groups], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = _norm(q, q_norm, epsilon), _norm(k, k_norm, epsilon)
    if cos.shape[-1]:
        q, k = (_rotate(part, cos[positions][:, None], sin[positions][:, None]) for part in (q, k))
    new = slice(cache_length, cache_length + width)
    for number, (cache, of_heads) in enumerate(((key, k), (value, v))):
        rows = of_heads.swapaxes(0, 1)
        if cache_scales is not None:
            rows = (rows / cache_scales[number][:, None]).round().clip(-QMAX, QMAX)
        cache[:, new] = rows.astype(cache_dtype).astype(np.float32)
    if upper_alone:
        key, value = (np.floor(cache / 16) * 16 + 8 for cache in (key, value))
    if cache_scales is not None:
        key, value = (cache * scale[:, None] for cache, scale in zip((key, value), cache_scales, strict=True))
    mask = np.tril(np.ones((width, width), np.bool_)) if tree_mask is None else tree_mask
    context = np.empty((width, num_heads, size), np.float32)
    for token in range(width):
        path = np.concatenate([np.arange(cache_length), cache_length + np.flatnonzero(mask[token])])
        path = path[-window:] if window else path
        for head in range(num_heads):
            group = head // (num_heads // groups)
            scores = key[group, path].astype(np.float64) @ q[token, head].astype(np.float64)
            scores *= size**-0.5 if scale is None else scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            context[token, head] = weights @ value[group, path].astype(np.float64) / weights.sum()
    return context.reshape(width, -1)


def verify_attention_batch(
    qkv: Float32,
    key: Float32,
    value: Float32,
    cache_lengths: NDArray[np.int64],
    positions: NDArray[np.int64],
    cos: Float32,
    sin: Float32,
    *,
    sequence_starts: NDArray[np.int64],
    cache_slots: NDArray[np.int64],
    num_heads: int,
    tree_mask: NDArray[np.bool_] | None = None,
    q_norm: Float32 | None = None,
    k_norm: Float32 | None = None,
    epsilon: float = 0.0,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    cache_dtype: np.dtype[Any] = _FLOAT32,
    cache_scales: tuple[Float32, Float32] | None = None,
    upper_alone: bool = False,
) -> Float32:
    """The reference for a batch of B sequences: context float32 [R, H·D]. The rest is as `verify_attention` has it.

    Args:
        qkv: float32 [R, (H + 2G)·D], the tokens of all sequences; `positions` alike.
        key: float32 [slots, G, S, D]. `value` alike.
        cache_lengths: int64 [B].
        sequence_starts: int64 [B + 1], ascending from 0: the first token of each sequence, then R.
        cache_slots: int64 [B], distinct: whose cache a sequence has.
        tree_mask: bool, one sequence's [T, T] after the other's; of no value, or None: every sequence is a chain.
    """
    context = np.empty((len(qkv), qkv.shape[-1] * num_heads // (num_heads + 2 * key.shape[1])), np.float32)
    masks = np.empty(0, np.bool_) if tree_mask is None else tree_mask
    seen = 0
    for sequence, slot in enumerate(cache_slots):
        rows = slice(sequence_starts[sequence], sequence_starts[sequence + 1])
        width = rows.stop - rows.start
        context[rows] = verify_attention(
            qkv[rows],
            key[slot],
            value[slot],
            int(cache_lengths[sequence]),
            positions[rows],
            cos,
            sin,
            num_heads=num_heads,
            tree_mask=masks[seen : seen + width * width].reshape(width, width) if len(masks) else None,
            q_norm=q_norm,
            k_norm=k_norm,
            epsilon=epsilon,
            scale=scale,
            softcap=softcap,
            window=window,
            cache_dtype=cache_dtype,
            cache_scales=cache_scales,
            upper_alone=upper_alone,
        )
        seen += width * width
    return context


def in_tiers(cache: NDArray[np.int8]) -> NDArray[np.int8]:
    """Int8 [..., G, S, D] → the same in two tiers, [..., 2G, S, D / 2]: of each head the upper halves, then the lower.

    D is a multiple of 16. A byte has the halves of two of sixteen values that stand side by side: of one of the first
    eight in its low bits, of the one eight further on in its high bits (QuantSpec, arXiv 2502.10424).
    """
    *before, groups, positions, size = cache.shape
    halves = np.stack([cache.view(np.uint8) >> 4, cache.view(np.uint8) & 15], axis=-3)
    first, second = np.split(halves.reshape(*before, groups, 2, positions, size // 16, 16), 2, axis=-1)
    packed = (first | second << 4).reshape(*before, 2 * groups, positions, size // 2)
    tiers: NDArray[np.int8] = packed.view(np.int8)
    return tiers


def of_tiers(tiers: NDArray[np.int8], *, upper_alone: bool = False) -> NDArray[np.int8]:
    """What `in_tiers` was given; `upper_alone`: with the middle of what lower halves can be in their place."""
    *before, planes, positions, half = tiers.shape
    packed = tiers.view(np.uint8).reshape(*before, planes // 2, 2, positions, half // 8, 8)
    halves = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(*before, planes // 2, 2, positions, 2 * half)
    upper, lower = halves[..., 0, :, :], halves[..., 1, :, :]
    joined: NDArray[np.int8] = (upper << 4 | (np.uint8(8) if upper_alone else lower)).view(np.int8)
    return joined


def _norm(heads: Float32, weight: Float32, epsilon: float) -> Float32:
    """Of [T, heads, D]: over each head's vector, or over all together where the weight is as long as they are."""
    values = heads.reshape(len(heads), -1) if len(weight) > heads.shape[-1] else heads
    return rms_norm(values, weight, epsilon).reshape(heads.shape)


def _rotate(x: Float32, cos: Float32, sin: Float32) -> Float32:
    half = cos.shape[-1]
    a, b, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
