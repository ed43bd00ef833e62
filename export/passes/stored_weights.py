"""Weights that a lowering stores in another order: written once, however many graphs read them."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from calibration.precisions.base import Operator
from export.builder import initializer
from export.passes.quantized_linear import QuantizedLinear
from export.weight_file import WeightFile

Array = NDArray[Any]


class StoredWeights:
    """The external data of one lowering."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._tensors: dict[str, ir.ExternalTensor] = {}

    def packed(
        self, linear: QuantizedLinear, operator: Operator, weight: str, scale: str, *, swiglu: bool = False
    ) -> tuple[ir.Value, ir.Value]:
        """A linear's weight and scale as an operator reads them, as initializers `<linear>.<weight>` and `.<scale>`.

        A scale that the operator takes as it is remains the canonical initializer.
        """
        packed = self._stored(f"{linear.name}.{weight}", linear.weight, lambda w: operator.pack_weight(w.T, swiglu))
        if (pack := operator.pack_scale) is None:
            return packed, linear.scale
        return packed, self._stored(f"{linear.name}.{scale}", linear.scale, lambda s: pack(s.T, swiglu))

    def _stored(self, name: str, weight: ir.Value, reorder: Callable[[Array], Array]) -> ir.Value:
        assert weight.const_value is not None
        if name not in self._tensors:
            self._tensors[name] = self._file.append(name, reorder(weight.const_value.numpy()))
        return initializer(self._tensors[name])
