"""The KL that the quantization of each linear alone adds, for all of them at once.

To second order, an error e of a linear's output moves the model's distribution by KL ≈ ½ E (g · e)², where g is the
gradient of the log-probability of tokens that are drawn from the float model itself: the Fisher information stands in
for the second derivative. One backward pass gives g for every linear; errors of different tokens count as independent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import FakeQuantizedLinear, module_of
from quasar.checkpoints import DecoderSpec

if TYPE_CHECKING:
    import torch

_DRAWS = 2

Sensitivities = dict[str, dict[str, float]]


def measure_sensitivities(
    model: "torch.nn.Module",
    spec: DecoderSpec,
    sequences: Sequence[Sequence[int]],
    forms: Mapping[str, Mapping[str, FakeQuantizedLinear]],
    on_sequence: Callable[[int], None] = lambda count: None,
) -> Sensitivities:
    """Linear → precision → estimated KL in nats per token that quantizing this linear alone adds.

    Args:
        forms: linear → precision → the linear as that precision computes it.
        on_sequence: called after each sequence, for progress.

    Tokens are drawn with a fixed seed: the same sequences give the same figures.
    """
    import torch

    sums: Sensitivities = {name: dict.fromkeys(choices, 0.0) for name, choices in forms.items()}
    generator = torch.Generator().manual_seed(0)
    for sequence in sequences:
        with _Watch(model, spec) as watch:
            log_p = torch.log_softmax(watch.logits(sequence), dim=-1)
        draws = []
        for _ in range(_DRAWS):
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            likelihood = log_p.gather(1, drawn).sum()
            draws.append(watch.gradients(likelihood))
        with torch.inference_mode():
            for name, choices in forms.items():
                for precision, form in choices.items():
                    error = form.product(watch.inputs[name]) - watch.exact(name)
                    moved = sum(float((draw[name] * error).sum(-1).square().sum()) for draw in draws)
                    sums[name][precision] += moved / (2 * _DRAWS)
        on_sequence(1)
    tokens = max(1, sum(map(len, sequences)))
    return {name: {precision: total / tokens for precision, total in added.items()} for name, added in sums.items()}


class _Watch:
    """Keeps every linear's input and output of one pass, with what a backward pass needs."""

    def __init__(self, model: Any, spec: DecoderSpec) -> None:
        self._model = model
        self._linears = list(spec.linears())
        self.inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in self._linears}
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watch":
        for linear in self._linears:
            for member in linear.members:
                module = module_of(self._model, member)
                self._handles.append(module.register_forward_hook(self._keep(linear.name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> "Callable[[Any, Any, torch.Tensor], None]":
        def keep(_: Any, arguments: Any, output: "torch.Tensor") -> None:
            self.inputs[name] = arguments[0].detach()[0].float()
            self._outputs[name].append(output)

        return keep

    def logits(self, sequence: Sequence[int]) -> "torch.Tensor":
        """Float32 [tokens, V], from which gradients can be taken."""
        import torch

        embedded = self._model.get_input_embeddings()(torch.tensor([list(sequence)])).detach().requires_grad_()
        logits: torch.Tensor = self._model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        return logits

    def gradients(self, likelihood: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Linear → gradient by its output, float32 [tokens, outputs]."""
        import torch

        outputs = [output for members in self._outputs.values() for output in members]
        found = iter(torch.autograd.grad(likelihood, outputs, retain_graph=True))
        return {
            name: torch.cat([next(found)[0] for _ in members], dim=-1).float()
            for name, members in self._outputs.items()
        }

    def exact(self, name: str) -> "torch.Tensor":
        """The linear's output without its bias, float32 [tokens, outputs]."""
        import torch

        linear = next(linear for linear in self._linears if linear.name == name)
        parts = []
        for member, output in zip(linear.members, self._outputs[name], strict=True):
            bias = module_of(self._model, member).bias
            parts.append(output.detach()[0] if bias is None else output.detach()[0] - bias)
        return torch.cat(parts, dim=-1).float()
