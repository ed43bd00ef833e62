"""Weights that a lowering stores in another order: written once, however many graphs read them."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from export.builder import initializer
from export.weight_file import WeightFile

Array = NDArray[Any]


class StoredWeights:
    """The external data of one lowering."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._tensors: dict[str, ir.ExternalTensor] = {}

    def stored(self, name: str, weight: ir.Value, reorder: Callable[[Array], Array]) -> ir.Value:
        """An initializer of that name with a canonical weight in another order."""
        assert weight.const_value is not None
        if name not in self._tensors:
            self._tensors[name] = self._file.append(name, reorder(weight.const_value.numpy()))
        return initializer(self._tensors[name])
