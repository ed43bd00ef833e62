"""Activation statistics: amax per input channel of every linear, and a sample of its inputs, from forward hooks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints import DecoderSpec
from quasar.files import atomic_path

if TYPE_CHECKING:
    import torch

Float32 = NDArray[np.float32]

_BATCH_TOKENS = 2048
# Inputs kept per linear for the SQNR figures.
SAMPLE_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStatistics:
    """What calibration saw, by linear name.

    `amax` float32 [inputs]; `samples` float32 [rows, inputs], rows spread over the text; `num_tokens` in all.
    """

    amax: dict[str, Float32]
    samples: dict[str, Float32]
    num_tokens: int

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        from safetensors.numpy import save_file

        tensors = {f"amax.{name}": value for name, value in self.amax.items()}
        tensors |= {f"samples.{name}": value for name, value in self.samples.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"num_tokens": str(self.num_tokens)})

    @classmethod
    def load(cls, path: Path) -> "ActivationStatistics":
        """Read what `save` wrote."""
        from safetensors import safe_open

        parts: dict[str, dict[str, Float32]] = {"amax": {}, "samples": {}}
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                kind, name = key.split(".", 1)
                parts[kind][name] = file.get_tensor(key)
            num_tokens = int(file.metadata()["num_tokens"])
        return cls(amax=parts["amax"], samples=parts["samples"], num_tokens=num_tokens)


def collect_statistics(
    model: "torch.nn.Module",
    spec: DecoderSpec,
    texts: Sequence[Sequence[int]],
    on_batch: Callable[[int], None] = lambda count: None,
) -> ActivationStatistics:
    """Run the float model over token sequences, in batches of at most 2048 padded tokens, and watch every linear."""
    import torch

    total = sum(map(len, texts))
    watch = _Watch(spec, total)
    handles = [
        _module(model, linear.members[0]).register_forward_pre_hook(watch.hook(linear.name))
        for linear in spec.linears()
    ]
    try:
        for batch in _batches(texts):
            longest = max(map(len, batch))
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            real = torch.zeros((len(batch), longest), dtype=torch.bool)
            for row, tokens in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                real[row, : len(tokens)] = True
            watch.real = real
            # Padding stands behind the text, where causal attention cannot see it.
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)
            on_batch(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return ActivationStatistics(
        amax={name: value.numpy() for name, value in watch.amax.items()},
        samples={name: np.concatenate(rows)[:SAMPLE_ROWS] for name, rows in watch.samples.items()},
        num_tokens=total,
    )


class _Watch:
    """Keeps running maxima and every n-th row of each linear's input."""

    def __init__(self, spec: DecoderSpec, total_tokens: int) -> None:
        self.amax: dict[str, torch.Tensor] = {}
        self.samples: dict[str, list[Float32]] = {linear.name: [] for linear in spec.linears()}
        self.real: torch.Tensor
        self._every = max(1, total_tokens // SAMPLE_ROWS)

    def hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def watch(_: Any, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0].detach()[self.real].float()
            largest = rows.abs().amax(dim=0)
            known = self.amax.get(name)
            self.amax[name] = largest if known is None else largest.maximum(known)
            self.samples[name].append(rows[:: self._every].numpy().copy())

        return watch


def _module(model: Any, member: str) -> Any:
    return model.lm_head if member == "lm_head" else model.model.get_submodule(member)


def _batches(texts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    batches: list[list[Sequence[int]]] = []
    for tokens in sorted(texts, key=len):
        if batches and (len(batches[-1]) + 1) * len(tokens) <= _BATCH_TOKENS:
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches
