"""What a precision is: how one linear is rounded, fake-quantized, written as ONNX, lowered and stored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray

from quasar.numerics import SMALLEST_SCALE, Array, Float32, QuantizedWeight, apply_scale, split

if TYPE_CHECKING:
    import torch

    from quasar.checkpoints.prequantized.weight import PrequantizedWeight

# Names of the back ends in `Precision.lowerings`: stock ONNX Runtime, the operators of plugins/cpu, TensorRT, and the
# kernels of plugins/gpu.
ONNXRUNTIME, NATIVE, TENSORRT, CUDA = "onnxruntime", "native", "tensorrt", "cuda"

# A value of the graph that is being written: opaque to a precision.
Value = Any


class LinearGraph(Protocol):
    """Where a precision writes one linear; `part` names a node or tensor within it: `<linear>.<part>`."""

    @property
    def name(self) -> str:
        """The linear's name."""

    def op(
        self, op_type: str, inputs: Sequence[Value], part: str, attributes: Mapping[str, Any] | None = None, /
    ) -> Value:
        """A standard ONNX operator of opset 24 with one output."""

    def product(self, op_type: str, inputs: Sequence[Value], part: str = "", /) -> Value:
        """The last operator, whose output is x Wᵀ without a bias; "": the node is named as its output is."""

    def constant(self, name: str, array: NDArray[Any] | Sequence[int], /) -> Value:
        """A small tensor, shared by all linears that ask for this name. Lists are int64."""

    def weight(self, part: str, array: NDArray[Any], /) -> Value:
        """A large tensor, kept in the weight file. Quantized weights are "weight" [inputs, …], "scale" and "offset"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsItIs:
    """A lowering: the back end runs the canonical form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A lowering: the back end cannot run this precision; `reason` is a sentence without a full stop."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """A lowering: one operator in place of the canonical form.

    Inputs are x, weight and scale; native operators also get bias, residual and norm (plugins/operator_table.py).

    Attributes:
        pack: the quantized weight → the two tensors in the operator's order; None: the scale is read as it is. The flag
            says that rows are gates and then ups of a gated MLP that the operator takes in, as native operators do.
        attributes: (outputs, inputs) → attributes of the node.
    """

    op_type: str
    domain: str
    pack: Callable[[QuantizedWeight, bool], tuple[NDArray[Any], NDArray[Any] | None]]
    attributes: Callable[[int, int], dict[str, Any]] = field(default=lambda outputs, inputs: {})


Lowering = AsItIs | Refused | Operator


class Precision(ABC):
    """One precision of a linear. Subclasses have no state: one object stands for all linears.

    Class attributes:
        name: of a linear, in the manifest.
        choice: what `--precision` calls an engine in which every linear has it.
        help: what `--help` says of it.
        label: one word for progress and messages.
        title: what messages call it: "linears are …", "linears above …".
        form: what sets it apart, in a few words: "makes linears …".
        colour: of its linears in a report's map.
        lowerings: by back end. A back end that is not named refuses.
        is_quantized: whether weights are stored as integers; else they stay float and the linear is not calibrated.
        weight_bits: of a weight that is stored as an integer.
        has_integer_activations: whether a back end must run an integer matmul.
        has_static_scale: whether one scale of all activations is searched and stored.
        learns_factors: whether the search learns smoothing factors; its formula holds for scales per token.
        clips_weights: whether the search may clip a channel's largest weights.
        is_on_ladder: whether "auto" may give a linear this precision.
        input_multiple: a linear's inputs must be a multiple of it.
        in_blocks: whether a weight has scales [outputs, groups] of groups of inputs, not one for each output.
        has_offsets: whether a weight has offsets beside its scales. Only checkpoints bring it: none is asked for.
        drafts_as: the precision that reads the same stored weights with coarser activations, in which an engine may
            draft for itself (QSpec, arXiv 2410.11305); "" where there is none.
    """

    name: ClassVar[str]
    choice: ClassVar[str]
    help: ClassVar[str]
    label: ClassVar[str]
    title: ClassVar[str]
    form: ClassVar[str]
    colour: ClassVar[str]
    lowerings: ClassVar[Mapping[str, Lowering]]
    is_quantized: ClassVar[bool] = True
    weight_bits: ClassVar[int] = 8
    has_integer_activations: ClassVar[bool] = True
    has_static_scale: ClassVar[bool] = False
    learns_factors: ClassVar[bool] = False
    clips_weights: ClassVar[bool] = False
    is_on_ladder: ClassVar[bool] = False
    input_multiple: ClassVar[int] = 1
    in_blocks: ClassVar[bool] = False
    has_offsets: ClassVar[bool] = False
    drafts_as: ClassVar[str] = ""

    @abstractmethod
    def scales_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Scales float32 [outputs, scales] of a weight float32 [outputs, inputs], by its largest magnitudes."""

    @abstractmethod
    def nearest(self, weight: "torch.Tensor", step: "torch.Tensor", /) -> "torch.Tensor":
        """Weights rounded to the nearest integers, as float32, under steps that broadcast with them."""

    @abstractmethod
    def quantize(self, weight: Float32) -> Float32 | QuantizedWeight:
        """A weight float32 [outputs, inputs] as it is stored, rounded to nearest; the same numbers as the two above."""

    def held(self, weight: "PrequantizedWeight") -> QuantizedWeight | None:
        """The same weight as this precision stores it, no value rounded; None where its grid is another.

        A precision whose scales are float16 may take the next one to a scale.
        """
        del weight
        return None

    @abstractmethod
    def round_activations(self, x: "torch.Tensor", static_scale: float, /) -> "torch.Tensor":
        """Activations float32 [..., inputs] as the linear sees them; `static_scale`: 0 where there is none."""

    @abstractmethod
    def canonical(
        self, graph: LinearGraph, x: Value, weight: Float32 | QuantizedWeight, static_scale: float, /
    ) -> Value:
        """Write y = x Wᵀ for x float32 [..., inputs]; returns y, which `graph.product` made."""

    @abstractmethod
    def num_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of weights and scales that a pass reads."""

    def round_weight(self, weight: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
        """The nearest integers, as float32 [outputs, inputs], under scales float32 [outputs, scales]."""
        return self.nearest(split(weight, scale.shape[1]), scale[..., None]).reshape(weight.shape)

    def rounded(self, weight: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
        """The weight float32 [outputs, inputs] that those integers stand for."""
        return apply_scale(self.round_weight(weight, scale), scale)

    def stored_scales(self, scale: Array) -> Array:
        """Scales that clipping or smoothing changed, float32 [outputs, …], as this precision stores them."""
        return scale.clip(SMALLEST_SCALE)

    def fake_quantized_product(self, x: "torch.Tensor", weight: "torch.Tensor", static_scale: float) -> "torch.Tensor":
        """What `canonical` computes, float32 [..., outputs], with the weight [outputs, inputs] of the integers."""
        return self.round_activations(x, static_scale) @ weight.t()

    def lowering(self, backend: str) -> Lowering:
        """What the linear becomes on a back end."""
        return self.lowerings.get(backend, Refused(reason=f"{backend} has no form of {self.name}"))
