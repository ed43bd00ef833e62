"""SmoothQuant (arXiv 2211.10438): move outliers of a linear's input channels into its weight.

    y = W x = (W · s) (x / s)

and `/ s` is folded into the operation that produces x, so the float model computes the same function. Which operation
that is, the architecture says (`SmoothingGroup`); a linear without such an operation is not smoothed. In decoders with
norms before attention and MLP:

    input_layernorm           → q/k/v        the norm's weight / s
    post_attention_layernorm  → gate/up      the norm's weight / s
    norm (final)              → lm_head      the norm's weight / s
    v_proj                    → o_proj       v_proj's rows and bias / s; query heads that share a kv head share s
    up_proj                   → down_proj    up_proj's rows and bias / s
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.architectures.base import SmoothingGroup
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.spec import split_name

if TYPE_CHECKING:
    import torch

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


def smoothing_factor(input_amax: Float, weight_amax: Float, alpha: float) -> Float:
    """S = amax_x^alpha / amax_w^(1-alpha), per input channel (SmoothQuant, equation 4): float [inputs]."""
    x = np.maximum(input_amax, _MIN_AMAX)
    w = np.maximum(weight_amax, _MIN_AMAX)
    return np.asarray(x**alpha / w ** (1 - alpha))


def shared_over_query_group(per_channel: Float, spec: DecoderSpec) -> Float:
    """The maximum over the query heads that read one kv head: [query_size] → [query_size], equal within a group."""
    heads = per_channel.reshape(spec.num_kv_heads, -1, spec.head_size)
    return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)


def takes_factor(spec: DecoderSpec, linear: str) -> bool:
    """Whether an operation makes a linear's input that can take a smoothing factor."""
    return _group_of_consumer(spec, linear) is not None


def group_factor(spec: DecoderSpec, linear: str, input_amax: Float, weight_amax: Float, alpha: float) -> Float:
    """The smoothing factor float [inputs] of one linear that `takes_factor`, with what its producer needs to take it.

    `input_amax`: of its input channels over the calibration text; `weight_amax`: of its weight per input channel.
    """
    if _shares_over_query_heads(spec, linear):
        input_amax, weight_amax = (shared_over_query_group(amax, spec) for amax in (input_amax, weight_amax))
    return smoothing_factor(input_amax, weight_amax, alpha)


def tie_of(spec: DecoderSpec, linear: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
    """What makes a linear's log s (or its gradient) such that its producer can take it; None if it can take any."""
    return partial(_tie_query_groups, spec) if _shares_over_query_heads(spec, linear) else None


def _tie_query_groups(spec: DecoderSpec, log_factor: "torch.Tensor") -> "torch.Tensor":
    """The mean over the query heads that read one kv head, [query_size] → [query_size]."""
    heads = log_factor.reshape(spec.num_kv_heads, -1, spec.head_size)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def fold(name: str, tensor: Float, spec: DecoderSpec, factors: SmoothingFactors) -> Float:
    """One tensor of the checkpoint with every factor that touches it folded in; the shape stays."""
    module, parameter = name.rsplit(".", 1)
    if (rows := producer_factor(module, spec, factors)) is not None:
        tensor = tensor / (rows if tensor.ndim == 1 else rows[:, None])
    linear = spec.linear_of(module)
    if linear is not None and parameter == "weight" and (s := factors.of(linear.name)) is not None:
        tensor = tensor * s[None, :]
    return tensor


def producer_factor(module: str, spec: DecoderSpec, factors: SmoothingFactors) -> Float | None:
    """What a norm's weight, or the rows of a projection, are divided by: its consumer's factor, or None."""
    _, part = split_name(module)
    group = next((group for group in _groups(spec) if group.producer == part), None)
    s = None if group is None else factors.of(module.removesuffix(part) + group.consumer)
    if s is None or group is None or not group.shared_by_query_heads:
        return s
    # The producer has one row per kv head, not per query head.
    heads = s.reshape(spec.num_kv_heads, -1, spec.head_size)
    return heads[:, 0, :].reshape(-1)


def _groups(spec: DecoderSpec) -> tuple[SmoothingGroup, ...]:
    return ARCHITECTURES[spec.architecture].smoothing


def _group_of_consumer(spec: DecoderSpec, linear: str) -> SmoothingGroup | None:
    _, part = split_name(linear)
    return next((group for group in _groups(spec) if group.consumer == part), None)


def _shares_over_query_heads(spec: DecoderSpec, linear: str) -> bool:
    group = _group_of_consumer(spec, linear)
    return group is not None and group.shared_by_query_heads
