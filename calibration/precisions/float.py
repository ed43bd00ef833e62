"""Float: weights and activations as they are."""

from typing import TYPE_CHECKING, ClassVar

from calibration.precisions.base import NATIVE, ONNXRUNTIME, TENSORRT, AsItIs, LinearGraph, Precision, Value
from quasar.numerics import Float32, QuantizedWeight

if TYPE_CHECKING:
    import torch

_WEIGHT_BYTES = 4


class Float(Precision):
    """MatMul in float32; in 16 bits on TensorRT."""

    name = "float"
    choice = "fp32"
    help = "no quantization"
    label = "float"
    form = "float"
    title = "float"
    colour = "#073763"
    is_quantized = False
    has_integer_activations = False
    is_on_ladder = True
    lowerings: ClassVar = {ONNXRUNTIME: AsItIs(), NATIVE: AsItIs(), TENSORRT: AsItIs()}

    def scales_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """One: nothing is scaled."""
        return weight.new_ones(len(weight), 1)

    def nearest(self, weight: "torch.Tensor", _step: "torch.Tensor", /) -> "torch.Tensor":
        """The weights themselves."""
        return weight

    def quantize(self, weight: Float32) -> Float32 | QuantizedWeight:
        """The weight itself."""
        return weight

    def round_activations(self, x: "torch.Tensor", _static_scale: float, /) -> "torch.Tensor":
        """The activations themselves."""
        return x

    def canonical(
        self, graph: LinearGraph, x: Value, weight: Float32 | QuantizedWeight, _static_scale: float, /
    ) -> Value:
        """Y = MatMul(x, W)."""
        assert not isinstance(weight, QuantizedWeight)
        return graph.product("MatMul", [x, graph.weight("weight", weight.T)])

    def num_bytes(self, outputs: int, inputs: int) -> int:
        """Four bytes a weight."""
        return _WEIGHT_BYTES * outputs * inputs
