"""The layout of compressed-tensors, which LLM Compressor writes: integers of 8 bits, or of 4 and 8 bits in words.

For K inputs, N outputs and G groups (1 where a channel has one scale): `weight` int8 [N, K], or `weight_packed` int32
[N, K bits / 32] with `weight_shape`; `weight_scale` float [N, G]. A weight is (q - zero) × scale; `weight_zero_point`
is int8 [N, G], or in words along the outputs; without it zeros are 0. What it says of activations is not read: an
engine gives each token a scale of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.prequantized.folder_layout import as_float32, expect_shapes, expect_words, in_order
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.checkpoints.prequantized.words import BITS, centred, unpacked
from quasar.errors import CheckpointError

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """How a group of modules is quantized: `group` inputs share a scale, 0 where a channel does, -1 where all do."""

    bits: int
    group: int

    def num_groups(self, inputs: int) -> int:
        """Scales of a channel; 0 where inputs are no multiple of the group."""
        return 1 if self.group <= 0 else 0 if inputs % self.group else inputs // self.group


class CompressedTensorsLayout:
    """A checkpoint's."""

    method = "compressed-tensors"
    key = "weight_scale"
    parts = (
        *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("input_scale", "input_zero_point"),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` for what is not read: floats of 8 and 4 bits, sparsity, rotations in the graph."""
        found = str(config.get("format", "pack-quantized"))
        if found not in _FORMATS:
            raise CheckpointError(f"quantization_config: format {found!r}; {', '.join(_FORMATS)} were expected")
        for option in ("sparsity_config", "transform_config"):
            value = config.get(option)
            # What else a dense one says is of its zeros, which are stored like other values.
            dense = option == "sparsity_config" and isinstance(value, Mapping) and value.get("format") == "dense"
            if value and not dense:
                raise CheckpointError(f"quantization_config: {option} {value!r} is not read")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError("quantization_config has no config_groups: download the checkpoint again")
        self._schemes = {_scheme(name, group) for name, group in groups.items()}

    def shape(self, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """From `weight`, or from `weight_packed` and the one number of bits that the config has for such a shape."""
        if "weight" in tensors:
            outputs, inputs = tensors["weight"]
            return outputs, inputs
        outputs, words = tensors["weight_packed"]
        groups = tensors["weight_scale"][-1]
        bits = {one.bits for one in self._schemes if one.num_groups(words * 32 // one.bits) == groups}
        return outputs, words * 32 // min(bits or {one.bits for one in self._schemes})

    def weight(self, tensors: Mapping[str, NDArray[Any]], where: str) -> PrequantizedWeight:
        """By the scheme that its shapes fit."""
        outputs, inputs = self.shape({name: tensor.shape for name, tensor in tensors.items()})
        is_packed = "weight_packed" in tensors
        scheme = self._fitting(tensors, inputs, where)
        groups = scheme.num_groups(inputs)
        if scheme.group == -1:
            tensors = {
                **tensors,
                "weight_scale": np.broadcast_to(tensors["weight_scale"].reshape(-1)[:1], (outputs, 1)),
            }
        expect_shapes(tensors, {"weight_scale": (outputs, groups)}, where)
        if is_packed:
            expect_shapes(tensors, {"weight_shape": (2,)}, where)
            expect_words(tensors, ("weight_packed",), where)
            if tensors["weight_shape"].tolist() != [outputs, inputs]:
                raise CheckpointError(
                    f"{where}.weight_shape says {tensors['weight_shape'].tolist()}, and weight_packed is of "
                    f"{[outputs, inputs]}: the checkpoint contradicts itself"
                )
            values = centred(unpacked(tensors["weight_packed"], scheme.bits), scheme.bits)
        else:
            values = tensors["weight"]
            if values.dtype != np.int8:
                raise CheckpointError(f"{where}.weight is stored as {values.dtype}; int8 was expected")
        scale = as_float32(tensors["weight_scale"])
        zeros = _zeros(tensors.get("weight_zero_point"), scheme, scale.shape, where)
        offset = None if zeros is None else -scale * zeros
        size = inputs // groups
        form = f"compressed-tensors, {scheme.bits} bits " + ("per channel" if groups == 1 else f"in groups of {size}")
        group_of = tensors.get("weight_g_idx")
        if not in_order(values, group_of, groups, where):
            assert group_of is not None
            scale, offset = scale[:, group_of], None if offset is None else offset[:, group_of]
            form = f"{form}, inputs in another order"
        return PrequantizedWeight(values=values, scale=scale, offset=offset, form=form).check(where)

    def _fitting(self, tensors: Mapping[str, NDArray[Any]], inputs: int, where: str) -> _Scheme:
        """Raises `CheckpointError` where the config has no scheme of such scales."""
        packed, scales = tensors.get("weight_packed"), tensors["weight_scale"]
        for scheme in sorted(self._schemes, key=lambda one: (one.bits, one.group)):
            bits = 8 if packed is None else packed.shape[1] * 32 // inputs
            count = 1 if scheme.group == -1 else scales.shape[-1] if scales.ndim == 2 else 0
            if scheme.bits == bits and scheme.num_groups(inputs) == count:
                return scheme
        raise CheckpointError(
            f"{where}.weight_scale has shape {list(scales.shape)}, which none of quantization_config's config_groups "
            f"has for {inputs} inputs"
        )


def _scheme(name: str, group: Any) -> _Scheme:
    """Raises `CheckpointError` for weights that are no integers of 4 or 8 bits."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"quantization_config: {name} says nothing of weights")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    size = weights.get("group_size")
    if kind != "int" or bits not in BITS or strategy not in ("tensor", "channel", "group"):
        raise CheckpointError(
            f"quantization_config: {name} has weights of {bits} bits, type {kind!r}, strategy {strategy!r}; integers "
            "of 4 or 8 bits per tensor, channel or group are read"
        )
    if strategy != "group":
        return _Scheme(bits=int(bits), group=-1 if strategy == "tensor" else 0)
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"quantization_config: {name} has group_size {size!r}; a number was expected")
    return _Scheme(bits=int(bits), group=size)


def _zeros(
    stored: NDArray[Any] | None, scheme: _Scheme, shape: tuple[int, ...], where: str
) -> NDArray[np.float32] | None:
    """Zero points float32 [N, G]; None where all are 0."""
    if stored is None:
        return None
    if stored.dtype == np.int32:
        stored = centred(unpacked(stored.T, scheme.bits), scheme.bits).T
    if stored.size == 1:
        stored = np.broadcast_to(stored.reshape(1, 1), shape)
    if stored.shape != shape or stored.dtype != np.int8:
        raise CheckpointError(
            f"{where}.weight_zero_point has shape {list(stored.shape)} and type {stored.dtype}; int8 {list(shape)} was "
            "expected"
        )
    return stored.astype(np.float32) if stored.any() else None
