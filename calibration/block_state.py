"""Where a walk over a model's blocks stands, in one file: what an interrupted build goes on from."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.quantized_model import LinearChoice
from quasar.files import atomic_path, safetensors_errors

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, kw_only=True)
class CandidateState:
    """A quantized model that grows block by block.

    By linear: its choice, smoothing factor float32 [inputs] or None, and figures; `quantized`: those with integers.
    `streams`: hidden states float32 [sequences, longest, hidden] of the held-out batches, as this model computes them.
    """

    choices: dict[str, LinearChoice] = field(default_factory=dict)
    factors: "dict[str, torch.Tensor | None]" = field(default_factory=dict)
    streams: "list[torch.Tensor]" = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class WalkState:
    """What is known after the first `num_done` blocks.

    `streams`: the float model's hidden states float32 [sequences, longest, hidden], by the name of a set of texts, a
    tensor for each batch. `candidates`: by precision. `figures`: what is reported of the walk, as JSON.
    """

    num_done: int = 0
    streams: "dict[str, list[torch.Tensor]]" = field(default_factory=dict)
    candidates: dict[str, CandidateState] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {
            f"streams/{name}/{number}": stream
            for name, streams in self.streams.items()
            for number, stream in enumerate(streams)
        }
        for precision, one in self.candidates.items():
            tensors |= {f"{precision}/streams/{number}": stream for number, stream in enumerate(one.streams)}
            tensors |= {
                f"{precision}/factors/{name}": value for name, value in one.factors.items() if value is not None
            }
        described = {
            "num_done": self.num_done,
            "streams": {name: len(streams) for name, streams in self.streams.items()},
            "candidates": {
                precision: {
                    "choices": {name: choice.to_json() for name, choice in one.choices.items()},
                    "streams": len(one.streams),
                }
                for precision, one in self.candidates.items()
            },
            "figures": self.figures,
        }
        arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
        with safetensors_errors(), atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata={"state": json.dumps(described)})

    @classmethod
    def load(cls, path: Path) -> "WalkState":
        """Read what `save` wrote."""
        import torch
        from safetensors import safe_open
        from safetensors.numpy import load_file

        with safe_open(path, framework="numpy") as file:
            described = json.loads(file.metadata()["state"])
        tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
        candidates = {}
        for precision, one in described["candidates"].items():
            choices = {name: LinearChoice(**choice) for name, choice in one["choices"].items()}
            candidates[precision] = CandidateState(
                choices=choices,
                factors={name: tensors.get(f"{precision}/factors/{name}") for name in choices},
                streams=[tensors[f"{precision}/streams/{number}"] for number in range(one["streams"])],
            )
        streams = {
            name: [tensors[f"streams/{name}/{number}"] for number in range(count)]
            for name, count in described["streams"].items()
        }
        return cls(num_done=described["num_done"], streams=streams, candidates=candidates, figures=described["figures"])
