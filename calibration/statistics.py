"""Activation statistics: amax per input channel of a block's linears, and a sample of their inputs, from hooks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import module_of
from calibration.output_error import LinearSample
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import Linear

if TYPE_CHECKING:
    import torch

# Tokens whose inputs are kept per linear, for the searches and the figures per linear: all that a model is given by its
# size. GPTQ needs them: half of them made its answers a sixth worse (SmolLM2 re-gridded, w4a8).
_SAMPLE_TOKENS = 4096


def sample_every(total_tokens: int) -> int:
    """n, so that every n-th of so many tokens is kept: at most 4096."""
    return max(1, -(-total_tokens // _SAMPLE_TOKENS))


@dataclass(slots=True)
class InputStatistics:
    """What calibration saw of one linear's inputs, batch after batch.

    `amax` float32 [inputs]; `parts` float32 [tokens, inputs] each, every n-th token; `weights` float32 [tokens] each.
    """

    amax: "torch.Tensor | None" = None
    parts: "list[torch.Tensor]" = field(default_factory=list)
    weights: "list[torch.Tensor]" = field(default_factory=list)

    def add(self, tokens: "torch.Tensor", every: int) -> None:
        """Add inputs float32 [tokens, inputs]."""
        largest = tokens.abs().amax(dim=0)
        self.amax = largest if self.amax is None else largest.maximum(self.amax)
        self.parts.append(tokens[::every].clone())

    def sample(self, weight: "torch.Tensor") -> LinearSample:
        """The linear's sample; a token's weight is 1 off the residual stream."""
        import torch

        assert self.amax is not None
        x = torch.cat(self.parts)
        weights = torch.cat(self.weights) if self.weights else torch.ones(len(x))
        return LinearSample(x=x, weight=weight, amax=self.amax, token_weights=weights)


class BlockWatch:
    """Watches the four linears of a block while the float model computes it.

    `every`: which tokens are kept (`sample_every`).
    """

    def __init__(self, model: Any, spec: DecoderSpec, index: int, every: int) -> None:
        self._model = model
        self._spec = spec
        self._index = index
        self._every = every
        # Which positions of the batch are no padding: bool [sequences, longest].
        self.real: torch.Tensor
        self.inputs = {linear.name: InputStatistics() for linear in spec.layer_linears(index)}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every linear's inputs are kept, and the weight of each kept token."""
        _, output, _, down = linears = self._spec.layer_linears(self._index)
        handles = [
            module_of(self._model, linear.members[0]).register_forward_pre_hook(self._input_of(linear))
            for linear in linears
        ]
        layer = self._model.model.layers[self._index]
        if self._spec.layers[self._index].output_norms:
            # What the next norm divides by are the outputs themselves where norms follow them.
            for linear, norm in ((output, "attention_output_layernorm"), (down, "mlp_output_layernorm")):
                module = module_of(self._model, f"layers.{self._index}.{norm}")
                handles.append(module.register_forward_pre_hook(self._normed_by(linear)))
        else:
            residual = module_of(self._model, f"layers.{self._index}.post_attention_layernorm")
            handles.append(residual.register_forward_pre_hook(self._normed_by(output)))
            handles.append(layer.register_forward_hook(self._residual_after(down)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def samples(self, weights: "Mapping[str, torch.Tensor]") -> dict[str, LinearSample]:
        """The linears' samples by name, with their weights float32 [outputs, inputs]."""
        return {name: self.inputs[name].sample(weight) for name, weight in weights.items()}

    def _input_of(self, linear: Linear) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, arguments: self.inputs[linear.name].add(arguments[0][self.real], self._every)

    def _normed_by(self, linear: Linear) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, arguments: self._weigh(linear, arguments[0])

    def _residual_after(self, linear: Linear) -> Callable[[Any, tuple[Any, ...], Any], None]:
        # Older transformers give a layer's output in a tuple.
        return lambda _, arguments, output: self._weigh(linear, output[0] if isinstance(output, tuple) else output)

    def _weigh(self, linear: Linear, stream: "torch.Tensor") -> None:
        tokens = stream[self.real][:: self._every]
        self.inputs[linear.name].weights.append(1 / tokens.square().mean(dim=-1).clamp_min(1e-12))
