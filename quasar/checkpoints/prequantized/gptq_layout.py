"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

For K inputs, N outputs and G groups: `qweight` int32 [K bits / 32, N], `qzeros` int32 [G, N bits / 32], `scales` float
[G, N], `g_idx` int32 [K], the group of each input. A weight is (q - zero) × scale; the first version of the format
stores zeros less 1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.prequantized.folder_layout import as_float32, expect_shapes, expect_words, in_order
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.checkpoints.prequantized.words import BITS, centred, unpacked
from quasar.errors import CheckpointError

# What AutoGPTQ's zeros are stored less, by `checkpoint_format`.
_STORED_LESS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 0}


class GptqLayout:
    """A checkpoint's."""

    method = "GPTQ"
    key = "qweight"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` for bits and formats that are not read."""
        bits, group = config.get("bits"), config.get("group_size", -1)
        stored = str(config.get("checkpoint_format", "gptq"))
        if bits not in BITS or not isinstance(group, int):
            raise CheckpointError(
                f"quantization_config: GPTQ with bits {bits!r} and group_size {group!r}; 4 or 8 bits and a number were "
                "expected"
            )
        if stored not in _STORED_LESS:
            raise CheckpointError(
                f"quantization_config: checkpoint_format {stored!r}; {' or '.join(_STORED_LESS)} was expected"
            )
        if config.get("dynamic"):
            raise CheckpointError("quantization_config: 'dynamic' gives modules bits of their own, which is not read")
        self._bits, self._group, self._stored_less = int(bits), group, _STORED_LESS[stored]

    def shape(self, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """From `qweight`."""
        words, outputs = tensors["qweight"]
        return outputs, words * 32 // self._bits

    def weight(self, tensors: Mapping[str, NDArray[Any]], where: str) -> PrequantizedWeight:
        """Inputs in another order than their groups' get a scale each, which no back end's grid has."""
        bits = self._bits
        outputs, inputs = self.shape({name: tensor.shape for name, tensor in tensors.items()})
        size = inputs if self._group == -1 else self._group
        groups = -(-inputs // max(size, 1))
        packed = outputs * bits // 32
        expect_shapes(tensors, {"qzeros": (groups, packed), "scales": (groups, outputs)}, where)
        expect_words(tensors, ("qweight", "qzeros"), where)
        values = centred(unpacked(tensors["qweight"].T, bits), bits)
        # In the arithmetic of 8 bits a stored zero that went round at 0 comes back.
        zeros = (unpacked(tensors["qzeros"], bits).T.astype(np.int32) + self._stored_less) % (1 << bits)
        scale = as_float32(tensors["scales"].T)
        offset = scale * (np.float32(1 << bits - 1) - zeros.astype(np.float32))
        group_of = tensors.get("g_idx")
        form = f"GPTQ, {bits} bits in groups of {size}"
        if not in_order(values, group_of, groups, where) or inputs % groups:
            chosen = np.arange(inputs) // size if group_of is None else group_of
            scale, offset, form = scale[:, chosen], offset[:, chosen], f"{form}, inputs in another order"
        return PrequantizedWeight(values=values, scale=scale, offset=offset if offset.any() else None, form=form).check(
            where
        )
