"""SmoothQuant (arXiv 2211.10438): move outliers of a linear's input channels into its weight.

    y = W x = (W · s) (x / s)

and `/ s` is folded into the operation that produces x, so the float model computes the same function. Five groups:

    input_layernorm           → q/k/v        the norm's weight / s
    post_attention_layernorm  → gate/up      the norm's weight / s
    norm (final)              → lm_head      the norm's weight / s
    v_proj                    → o_proj       v_proj's rows and bias / s; query heads that share a kv head share s
    up_proj                   → down_proj    up_proj's rows and bias / s
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints import DecoderSpec

Float = NDArray[np.floating]

# SmoothQuant's own clamp: a channel that never fires must not blow up its weights.
_MIN_AMAX = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothingFactors:
    """Linear name → smoothing factor float [inputs] of its group. A linear that is not listed is not smoothed."""

    by_linear: Mapping[str, Float] = field(default_factory=dict)

    def of(self, linear: str) -> Float | None:
        """The factor s of a linear's input channels."""
        return self.by_linear.get(linear)


class WeightAmax(Protocol):
    """Gives a linear's largest absolute weight per input channel: float [inputs]."""

    def __call__(self, linear: str, /) -> Float:
        """Amax of one linear's weight."""


def smoothing_factor(input_amax: Float, weight_amax: Float, alpha: float) -> Float:
    """S = amax_x^alpha / amax_w^(1-alpha), per input channel (SmoothQuant, equation 4): float [inputs]."""
    x = np.maximum(input_amax, _MIN_AMAX)
    w = np.maximum(weight_amax, _MIN_AMAX)
    return np.asarray(x**alpha / w ** (1 - alpha))


def shared_over_query_group(per_channel: Float, spec: DecoderSpec) -> Float:
    """The maximum over the query heads that read one kv head: [query_size] → [query_size], equal within a group."""
    heads = per_channel.reshape(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_size)
    return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)


def choose_factors(
    spec: DecoderSpec, input_amax: Mapping[str, Float], weight_amax: WeightAmax, alpha: float, skip: frozenset[str]
) -> SmoothingFactors:
    """Smoothing factors of every linear that is not in `skip` (those that stay float need none).

    Args:
        input_amax: linear name → amax of its input channels over the calibration text, float [inputs].
        weight_amax: gives amax of a linear's weight per input channel, float [inputs].
    """
    factors: dict[str, Float] = {}
    for linear in spec.linears():
        if linear.name in skip:
            continue
        x, w = input_amax[linear.name], weight_amax(linear.name)
        if linear.name.endswith(".o_proj"):
            x, w = shared_over_query_group(x, spec), shared_over_query_group(w, spec)
        factors[linear.name] = smoothing_factor(x, w, alpha)
    return SmoothingFactors(by_linear=factors)


def fold(name: str, tensor: Float, spec: DecoderSpec, factors: SmoothingFactors) -> Float:
    """One tensor of the checkpoint with every factor that touches it folded in; the shape stays."""
    module, parameter = name.rsplit(".", 1)
    consumer = _consumer(module)
    if consumer is not None and (s := factors.of(consumer)) is not None:
        rows = _of_producer(module, s, spec)
        tensor = tensor / (rows if tensor.ndim == 1 else rows[:, None])
    linear = _linear_of(module)
    if linear is not None and parameter == "weight" and (s := factors.of(linear)) is not None:
        tensor = tensor * s[None, :]
    return tensor


def _consumer(module: str) -> str | None:
    """The linear whose input this module produces."""
    if module == "norm":
        return "lm_head"
    for producer, consumer in (
        (".input_layernorm", ".self_attn.qkv_proj"),
        (".post_attention_layernorm", ".mlp.gate_up_proj"),
        (".self_attn.v_proj", ".self_attn.o_proj"),
        (".mlp.up_proj", ".mlp.down_proj"),
    ):
        if module.endswith(producer):
            return module.removesuffix(producer) + consumer
    return None


def _linear_of(module: str) -> str | None:
    """The (fused) linear that a projection is part of."""
    stem, _, projection = module.rpartition(".")
    if projection in ("q_proj", "k_proj", "v_proj"):
        return f"{stem}.qkv_proj"
    if projection in ("gate_proj", "up_proj"):
        return f"{stem}.gate_up_proj"
    return module if projection in ("o_proj", "down_proj", "lm_head") else None


def _of_producer(module: str, s: Float, spec: DecoderSpec) -> Float:
    """A consumer's factor as its producer's channels see it: v_proj has one row per kv head, not per query head."""
    if not module.endswith(".v_proj"):
        return s
    heads = s.reshape(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_size)
    return heads[:, 0, :].reshape(-1)
