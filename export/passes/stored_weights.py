"""Weights that a lowering stores in another order: written once, however many graphs read them."""

import numpy as np
import onnx_ir as ir

from calibration.precisions.base import Operator
from export.builder import initializer
from export.passes.quantized_linear import QuantizedLinear
from export.weight_file import WeightFile
from quasar.numerics import QuantizedWeight


class StoredWeights:
    """The external data of one lowering."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._tensors: dict[str, ir.ExternalTensor] = {}

    def packed(
        self,
        graph: ir.Graph,
        linear: QuantizedLinear,
        operator: Operator,
        weight: str,
        scale: str,
        *,
        gated: bool = False,
    ) -> tuple[ir.Value, ir.Value]:
        """A linear's weight and scale as an operator reads them, as initializers `<linear>.<weight>` and `.<scale>`.

        They are registered in the graph. A scale that the operator takes as it is remains the canonical one.
        """
        names = f"{linear.name}.{weight}", f"{linear.name}.{scale}"
        if names[0] not in self._tensors:
            assert linear.weight.const_value is not None
            assert linear.scale.const_value is not None
            # INT4 tensors come as numbers of 4 bits.
            values, scales = linear.weight.const_value.numpy().astype(np.int8), linear.scale.const_value.numpy()
            offset = None
            if linear.offset is not None:
                assert linear.offset.const_value is not None
                offset = linear.offset.const_value.numpy().T
            packed = operator.pack(QuantizedWeight(values=values.T, scale=scales.T, offset=offset), gated)
            for name, array in zip(names, packed, strict=True):
                if array is not None:
                    self._tensors[name] = self._file.append(name, array)
        made = [initializer(self._tensors[name]) for name in names if name in self._tensors]
        for value in made:
            graph.register_initializer(value)
        return made[0], made[1] if len(made) == 2 else linear.scale
