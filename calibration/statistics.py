"""Activation statistics: amax per input channel of every linear, and a sample of its inputs, from forward hooks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from calibration.fake_quantization import module_of
from quasar.checkpoints import DecoderSpec

if TYPE_CHECKING:
    import torch

Float32 = NDArray[np.float32]
Float16 = NDArray[np.float16]

_BATCH_TOKENS = 2048
# Tokens whose inputs are kept per linear, for the searches and the figures per linear.
SAMPLE_TOKENS = 2048
# Samples are kept in float16; larger values are clamped to its largest number.
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStatistics:
    """What calibration saw, by linear name.

    `amax` float32 [inputs]; `samples` float16 [tokens, inputs], spread over the text; `num_tokens` in all.
    `token_weights` float32 [tokens], for o_proj and down_proj: 1 / mean square of what the next norm divides by, which
    is the residual stream that their outputs are added to, or these themselves where norms follow them.
    """

    amax: dict[str, Float32]
    samples: dict[str, Float16]
    token_weights: dict[str, Float32]
    num_tokens: int

    def weights_of_tokens(self, linear: str) -> Float32:
        """The weight of each sampled token's output error, float32 [tokens]: 1 for linears off the residual stream."""
        weights = self.token_weights.get(linear)
        return np.ones(len(self.samples[linear]), np.float32) if weights is None else weights


def collect_statistics(
    model: "torch.nn.Module",
    spec: DecoderSpec,
    sequences: Sequence[Sequence[int]],
    on_batch: Callable[[int], None] = lambda count: None,
) -> ActivationStatistics:
    """Run the float model over token sequences, in batches of at most 2048 padded tokens, and watch every linear."""
    import torch

    total = sum(map(len, sequences))
    watch = _Watch(spec, total)
    handles = [
        module_of(model, linear.members[0]).register_forward_pre_hook(watch.hook(linear.name))
        for linear in spec.linears()
    ]
    for index, layer in enumerate(cast("Any", model).model.layers):
        _, output, _, down = spec.layer_linears(index)
        if spec.layers[index].output_norms:
            for linear, norm in ((output, "attention_output_layernorm"), (down, "mlp_output_layernorm")):
                module = module_of(model, f"layers.{index}.{norm}")
                handles.append(module.register_forward_pre_hook(watch.normed_by(linear.name)))
            continue
        residual = module_of(model, f"layers.{index}.post_attention_layernorm")
        handles.append(residual.register_forward_pre_hook(watch.normed_by(output.name)))
        handles.append(layer.register_forward_hook(watch.residual_after(down.name)))
    try:
        for batch in _batches(sequences):
            longest = max(map(len, batch))
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            real = torch.zeros((len(batch), longest), dtype=torch.bool)
            for row, tokens in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                real[row, : len(tokens)] = True
            watch.real = real
            # Padding stands after the sequence, where causal attention cannot see it.
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)
            on_batch(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return ActivationStatistics(
        amax={name: value.numpy() for name, value in watch.amax.items()},
        samples={name: np.concatenate(parts) for name, parts in watch.samples.items()},
        token_weights={name: np.concatenate(parts) for name, parts in watch.token_weights.items()},
        num_tokens=total,
    )


class _Watch:
    """Keeps running maxima and every n-th token of each linear's input."""

    def __init__(self, spec: DecoderSpec, total_tokens: int) -> None:
        self.amax: dict[str, torch.Tensor] = {}
        self.samples: dict[str, list[Float16]] = {linear.name: [] for linear in spec.linears()}
        self.token_weights: dict[str, list[Float32]] = {}
        self.real: torch.Tensor
        self._every = max(1, -(-total_tokens // SAMPLE_TOKENS))

    def hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def watch(_: Any, arguments: tuple[Any, ...]) -> None:
            tokens = arguments[0].detach()[self.real].float()
            largest = tokens.abs().amax(dim=0)
            known = self.amax.get(name)
            self.amax[name] = largest if known is None else largest.maximum(known)
            kept = tokens[:: self._every].clamp(-_LARGEST, _LARGEST)
            self.samples[name].append(kept.numpy().astype(np.float16))

        return watch

    def normed_by(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, arguments: self._residual(name, arguments[0])

    def residual_after(self, name: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        # Older transformers give a layer's output in a tuple.
        return lambda _, arguments, output: self._residual(name, output[0] if isinstance(output, tuple) else output)

    def _residual(self, name: str, stream: Any) -> None:
        tokens = stream.detach()[self.real][:: self._every].float()
        weights = 1 / tokens.square().mean(dim=-1).clamp_min(1e-12)
        self.token_weights.setdefault(name, []).append(weights.numpy())


def _batches(sequences: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    batches: list[list[Sequence[int]]] = []
    for tokens in sorted(sequences, key=len):
        if batches and (len(batches[-1]) + 1) * len(tokens) <= _BATCH_TOKENS:
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches
