"""Fake quantization: the quantized verifier's arithmetic in torch, which the searches judge before anything is built.

How a linear is computed is its precision's (`calibration.precisions`), in float32, as a back end's scales are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from calibration.precisions.base import Precision
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.architectures.families import ARCHITECTURES

if TYPE_CHECKING:
    import torch

# Larger than what the C library keeps when it is freed.
_VALUES_AT_ONCE = 1 << 24


class LinearForm(Protocol):
    """What stands in for a linear of the float model."""

    def product(self, x: "torch.Tensor", /) -> "torch.Tensor":
        """The output without its bias, float32 [..., outputs], for x float32 [..., inputs]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeQuantizedLinear:
    """A linear as the verifier would compute it.

    `weight` gives rows of the smoothed weight that its integers stand for, float32 [rows, inputs], anew on every use,
    so that a search need not hold a second model. `factor`: float32 [inputs], or None. `static_scale`: of
    activations, 0 where the precision has none.
    """

    precision: Precision
    weight: "Callable[[slice], torch.Tensor]"
    num_outputs: int
    factor: "torch.Tensor | None" = None
    static_scale: float = 0.0

    def product(self, x: "torch.Tensor") -> "torch.Tensor":
        """The linear's output without its bias, float32 [..., outputs], for x float32 [..., inputs]."""
        import torch

        smoothed = x if self.factor is None else x / self.factor
        parts = [
            self.precision.fake_quantized_product(smoothed, self.weight(rows), self.static_scale)
            for rows in row_slices(self.num_outputs, x.shape[-1])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def row_slices(outputs: int, inputs: int) -> Iterator[slice]:
    """Rows of a weight [outputs, inputs] that hold at most 16 M values each: what is in float32 at once."""
    rows = max(1, _VALUES_AT_ONCE // inputs)
    for start in range(0, outputs, rows):
        yield slice(start, min(start + rows, outputs))


@contextmanager
def fake_quantized(
    model: "torch.nn.Module", spec: DecoderSpec, linears: Mapping[str, LinearForm]
) -> "Iterator[torch.nn.Module]":
    """Inside, the model computes the named linears as the verifier would; one that is not named stays float."""
    replaced: list[Any] = []
    try:
        for linear in spec.linears():
            form = linears.get(linear.name)
            if form is None:
                continue
            shared = _SharedProduct(form)
            for member in linear.members:
                module = module_of(model, member)
                module.forward = shared.forward_of(module)
                replaced.append(module)
        yield model
    finally:
        for module in replaced:
            # Without the instance's attribute, the class's own method is found again.
            del module.forward


class _SharedProduct:
    """The members of one linear read one input: it is rounded, and the weight dequantized, once for all of them."""

    def __init__(self, form: LinearForm) -> None:
        self._form = form
        self._num_outputs = 0
        self._input: Any = None
        self._product: Any = None

    def forward_of(self, module: Any) -> "Callable[[torch.Tensor], torch.Tensor]":
        start = self._num_outputs
        stop = self._num_outputs = start + module.out_features

        def forward(x: "torch.Tensor") -> "torch.Tensor":
            if x is not self._input:
                self._input, self._product = x, self._form.product(x.float())
            y = self._product[..., start:stop]
            if stop == self._num_outputs:
                # The last member frees what the others shared.
                self._input = self._product = None
            biased: torch.Tensor = y if module.bias is None else y + module.bias
            return biased.to(x.dtype)

        return forward


def module_of(model: Any, member: str) -> Any:
    """The torch module of a linear's member, or of a norm, by canonical name."""
    own = ARCHITECTURES[model.config.model_type].module_name(member)
    return model.lm_head if own == "lm_head" else model.model.get_submodule(own)
