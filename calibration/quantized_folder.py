"""Quantized linears on disk, one file each: a search holds one of them in memory, not a second model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quasar.files import safetensors_errors
from quasar.numerics import QuantizedWeight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class QuantizedFolder:
    """`<linear>.safetensors` in a folder: `values` int8 [outputs, inputs], `scale` float32 [outputs, scales].

    `offset` float32 [outputs, scales] beside them where a checkpoint brought it.
    """

    path: Path

    def save(self, linear: str, values: "torch.Tensor", scale: "torch.Tensor") -> None:
        """Write a linear's integers and scales."""
        self.save_weight(linear, QuantizedWeight(values=values.numpy(), scale=scale.numpy()))

    def save_weight(self, linear: str, weight: QuantizedWeight) -> None:
        """The same for a weight that came as it is."""
        from safetensors.numpy import save_file

        self.path.mkdir(parents=True, exist_ok=True)
        tensors = {"values": weight.values, "scale": weight.scale.reshape(len(weight.scale), -1)}
        if weight.offset is not None:
            tensors["offset"] = weight.offset
        with safetensors_errors():
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, self._file(linear))

    def load(self, linear: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """Its integers and scales."""
        import torch

        # Not torch's reader: its tensors keep the file open for as long as they live.
        from safetensors.numpy import load_file

        tensors = load_file(self._file(linear))
        return torch.from_numpy(tensors["values"]), torch.from_numpy(tensors["scale"])

    def num_outputs(self, linear: str) -> int:
        """Rows of a linear's weight."""
        from safetensors import safe_open

        with safe_open(self._file(linear), framework="numpy") as file:
            rows: int = file.get_slice("scale").get_shape()[0]
        return rows

    def read(self, linear: str) -> QuantizedWeight | None:
        """The same in numpy, as `quantize_weight` gives it; None for a linear that was not saved."""
        from safetensors.numpy import load_file

        if not self._file(linear).is_file():
            return None
        tensors = load_file(self._file(linear))
        scale, offset = tensors["scale"], tensors.get("offset")
        if scale.shape[1] == 1 and offset is None:
            scale = scale[:, 0]
        return QuantizedWeight(values=tensors["values"], scale=scale, offset=offset)

    def _file(self, linear: str) -> Path:
        return self.path / f"{linear}.safetensors"
