"""The quantized verifier's arithmetic in torch: what the searches measure before anything is built.

Integers are those of `calibration.affine`; products run in float32, as a back end's scales do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from calibration.affine import AMAX_FLOOR, BLOCK, QMAX, weight_scale
from calibration.recipe import LinearPrecision
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.architectures.registry import ARCHITECTURES

if TYPE_CHECKING:
    import torch


class LinearForm(Protocol):
    """What stands in for a linear of the float model."""

    @property
    def precision(self) -> LinearPrecision:
        """Linears of "float" are left as they are."""

    def product(self, x: "torch.Tensor", /) -> "torch.Tensor":
        """The output without its bias, float32 [..., outputs], for x float32 [..., inputs]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedLinear:
    """A linear as the verifier would compute it.

    `weight` gives the smoothed weight that its integers stand for, float32 [outputs, inputs]; it is called on every
    use, so that a search need not hold a second model. `factor`: float32 [inputs], or None. `static_scale`: of
    w8a8-static.
    """

    precision: LinearPrecision
    weight: "Callable[[], torch.Tensor]"
    factor: "torch.Tensor | None" = None
    static_scale: float = 0.0

    def product(self, x: "torch.Tensor") -> "torch.Tensor":
        """The linear's output without its bias, float32 [..., outputs], for x float32 [..., inputs]."""
        smoothed = x if self.factor is None else x / self.factor
        return round_activations(smoothed, self.precision, self.static_scale) @ self.weight().t()


def round_activations(x: "torch.Tensor", precision: LinearPrecision, static_scale: float = 0.0) -> "torch.Tensor":
    """Activations float32 [..., inputs] as the integers of a precision stand for them."""
    if precision == "w8a8-token":
        return _round_tokens(x)
    if precision == "w8a8-block":
        return _round_tokens(_split(x, x.shape[-1] // BLOCK)).flatten(-2)
    if precision == "w8a8-static":
        return (x / static_scale).round_().clamp_(-128, QMAX).mul_(static_scale)
    return x


def _round_tokens(x: "torch.Tensor") -> "torch.Tensor":
    """`dequantize_tokens(*quantize_tokens(x))`, in torch."""
    import torch

    step = torch.tensor(1.0) / QMAX
    amax = x.abs().amax(-1, keepdim=True).clamp_min_(AMAX_FLOOR)
    return (x / amax).div_(step).round_().clamp_(-128, QMAX).mul_(step).mul_(amax)


def round_weight(weight: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    """Nearest integers, as float32 [outputs, inputs], under scales float32 [outputs, scales]."""
    rows = _split(weight, scale.shape[1])
    return (rows / scale[..., None]).round_().clamp_(-QMAX, QMAX).reshape(weight.shape)


def apply_scale(values: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    """The weight float32 [outputs, inputs] that integers stand for under scales float32 [outputs, scales]."""
    rows = _split(values, scale.shape[1]).float()
    return (rows * scale[..., None]).reshape(values.shape)


def scale_of(weight: "torch.Tensor", precision: LinearPrecision) -> "torch.Tensor":
    """Scales float32 [outputs, scales] by the largest magnitude: one per row, or per row and 32 inputs."""
    import torch

    rows = _split(weight, weight.shape[1] // BLOCK if precision == "w8a8-block" else 1)
    return torch.from_numpy(weight_scale(rows.abs().amax(-1).numpy()))


def _split(x: "torch.Tensor", parts: int) -> "torch.Tensor":
    return x.reshape(*x.shape[:-1], parts, -1)


@contextmanager
def simulated(
    model: "torch.nn.Module", spec: DecoderSpec, linears: Mapping[str, LinearForm]
) -> "Iterator[torch.nn.Module]":
    """Inside, the model computes the named linears as the verifier would; one that is not named stays float."""
    replaced: list[Any] = []
    try:
        for linear in spec.linears():
            form = linears.get(linear.name)
            if form is None or form.precision == "float":
                continue
            shared = _SharedProduct(form)
            for member in linear.members:
                module = module_of(model, member)
                module.forward = shared.forward_of(module)
                replaced.append(module)
        yield model
    finally:
        for module in replaced:
            # The class's own method is behind the instance's.
            del module.forward


class _SharedProduct:
    """The members of one linear read one input: it is rounded, and the weight dequantized, once for all of them."""

    def __init__(self, form: LinearForm) -> None:
        self._form = form
        self._rows = 0
        self._input: Any = None
        self._product: Any = None

    def forward_of(self, module: Any) -> "Callable[[torch.Tensor], torch.Tensor]":
        start = self._rows
        stop = self._rows = start + module.out_features

        def forward(x: "torch.Tensor") -> "torch.Tensor":
            if x is not self._input:
                self._input, self._product = x, self._form.product(x.float())
            y = self._product[..., start:stop]
            if stop == self._rows:
                # The last member frees what the others shared.
                self._input = self._product = None
            biased: torch.Tensor = y if module.bias is None else y + module.bias
            return biased.to(x.dtype)

        return forward


def module_of(model: Any, member: str) -> Any:
    """The torch module of a linear's member, or of a norm, by canonical name."""
    own = ARCHITECTURES[model.config.model_type].checkpoint_name(member)
    return model.lm_head if own == "lm_head" else model.model.get_submodule(own)
