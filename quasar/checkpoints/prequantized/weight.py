"""`PrequantizedWeight`: a linear's weight on the grid that its checkpoint has it on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
from numpy.typing import NDArray

from quasar.errors import CheckpointError
from quasar.numerics import Float32, Int8, apply_scale, with_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class PrequantizedWeight:
    """A weight [outputs, inputs] = values × scale + offset.

    `values` int8 [outputs, inputs]; `scale` float32 [outputs, groups], a group of inputs after another, which may be
    negative or 0; `offset` float32 [outputs, groups], or None where it is 0 throughout. `form`: what messages call the
    grid.
    """

    values: Int8
    scale: Float32
    offset: Float32 | None = None
    form: str

    @property
    def num_groups(self) -> int:
        """Scales of an output."""
        return int(self.scale.shape[1])

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return int(self.values.shape[1]) // self.num_groups

    def rows(self, rows: NDArray[np.int64]) -> "PrequantizedWeight":
        """Some of the outputs."""
        offset = None if self.offset is None else self.offset[rows]
        return replace(self, values=self.values[rows], scale=self.scale[rows], offset=offset)

    def dequantized(self) -> Float32:
        """The weight float32 [outputs, inputs] that the grid stands for."""
        return with_offset(apply_scale(self.values.astype(np.float32), self.scale), self.offset)

    def check(self, where: str) -> "PrequantizedWeight":
        """Itself; raises `CheckpointError` for scales that are not finite, or that are not of whole groups."""
        outputs, inputs = self.values.shape
        if self.scale.ndim != 2 or len(self.scale) != outputs or not self.num_groups or inputs % self.num_groups:
            raise CheckpointError(
                f"{where}: scales of shape {list(self.scale.shape)} for a weight of [{outputs}, {inputs}]: the "
                "checkpoint contradicts itself"
            )
        if not np.isfinite(self.scale).all() or (self.offset is not None and not np.isfinite(self.offset).all()):
            raise CheckpointError(f"{where} has scales that are not finite: the checkpoint is damaged")
        return self


def stacked(weights: Sequence[PrequantizedWeight]) -> PrequantizedWeight:
    """Weights of the same inputs, one below the other, in groups that each of theirs is a number of."""
    if len(weights) == 1:
        return weights[0]
    groups = lcm(*(weight.num_groups for weight in weights))
    scales = [_spread(weight.scale, groups) for weight in weights]
    has_offset = any(weight.offset is not None for weight in weights)
    offsets = [
        np.zeros_like(scale) if weight.offset is None else _spread(weight.offset, groups)
        for weight, scale in zip(weights, scales, strict=True)
    ]
    return PrequantizedWeight(
        values=np.concatenate([weight.values for weight in weights]),
        scale=np.concatenate(scales),
        offset=np.concatenate(offsets) if has_offset else None,
        form=" and ".join(dict.fromkeys(weight.form for weight in weights)),
    )


def _spread(numbers: Float32, groups: int) -> Float32:
    """Of groups that are cut into smaller ones: [outputs, groups]."""
    return np.repeat(numbers, groups // numbers.shape[1], axis=1)
