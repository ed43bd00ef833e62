"""AWQ's layout for matrix products ("gemm"), as AutoAWQ writes it.

For K inputs, N outputs and G groups: `qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8], `scales` float16 [G, N]. A
word holds eight neighbouring outputs in an order of its own. A weight is (q - zero) × scale.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.prequantized.folder_layout import as_float32, expect_shapes, expect_words
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.checkpoints.prequantized.words import centred, unpacked
from quasar.errors import CheckpointError

_BITS = 4
# Where in a word each of eight outputs stands.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqLayout:
    """A checkpoint's."""

    method = "AWQ"
    key = "qweight"
    parts = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` for bits and versions that are not read."""
        bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
        self._group = config.get("group_size", config.get("q_group_size"))
        if bits != _BITS or version != "gemm" or not isinstance(self._group, int):
            raise CheckpointError(
                f"quantization_config: AWQ of version {version!r} with bits {bits!r} and group_size {self._group!r}; "
                "'gemm', 4 bits and a number were expected"
            )

    def shape(self, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """From `qweight`."""
        inputs, words = tensors["qweight"]
        return words * 32 // _BITS, inputs

    def weight(self, tensors: Mapping[str, NDArray[Any]], where: str) -> PrequantizedWeight:
        """Zeros that are all 8 make it symmetric."""
        outputs, inputs = self.shape({name: tensor.shape for name, tensor in tensors.items()})
        size = inputs if self._group == -1 else self._group
        groups = inputs // max(size, 1)
        packed = outputs * _BITS // 32
        expect_shapes(tensors, {"qzeros": (groups, packed), "scales": (groups, outputs)}, where)
        expect_words(tensors, ("qweight", "qzeros"), where)
        values = centred(np.ascontiguousarray(_outputs_in_order(tensors["qweight"]).T), _BITS)
        zeros = _outputs_in_order(tensors["qzeros"]).T.astype(np.float32)
        scale = as_float32(tensors["scales"].T)
        offset = scale * (np.float32(1 << _BITS - 1) - zeros)
        return PrequantizedWeight(
            values=values, scale=scale, offset=offset if offset.any() else None, form=f"AWQ in groups of {size}"
        ).check(where)


def _outputs_in_order(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """[rows, N / 8] → [rows, N]."""
    eights = unpacked(words, _BITS).reshape(len(words), -1, len(_PLACES))
    ordered: NDArray[np.uint8] = eights[:, :, _PLACES].reshape(len(words), -1)
    return ordered
