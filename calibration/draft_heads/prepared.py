"""A draft head's tensors as its graph gets them: weights rounded to nearest, one linear at a time."""

from dataclasses import dataclass

import numpy as np

from calibration.precisions.base import Precision
from calibration.precisions.catalog import FLOAT
from calibration.weights import PreparedLinear
from engines.draft_head import TARGET_NORM
from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint import read_float32
from quasar.checkpoints.spec import Linear
from quasar.draft_heads.folder import DraftHead
from quasar.numerics import Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDraftHead:
    """What `export.draft_head` reads; `target`: the checkpoint that lends the LM head and the final norm.

    Drafts are verified, so nothing is calibrated: smoothing and rounding that look at activations bring a head of one
    layer less than it takes to find them.
    """

    head: DraftHead
    precision: Precision
    target: Checkpoint | None = None

    def vector(self, name: str) -> Float32:
        """A norm's weight float32 [channels]."""
        if name == f"{TARGET_NORM}.weight":
            return self._of_target("norm.weight") + np.float32(self._checkpoint.spec.norm_offset)
        return self._own(name)

    def linear(self, linear: Linear) -> PreparedLinear:
        """A linear with its members' rows stacked; in float32 where the precision does not take its inputs."""
        weight = np.concatenate([self._member(f"{member}.weight") for member in linear.members])
        biases = [
            self._own(f"{member}.bias") if has else np.zeros(rows, np.float32)
            for member, rows, has in zip(linear.members, linear.rows, linear.bias, strict=True)
        ]
        precision = FLOAT if linear.inputs % self.precision.input_multiple else self.precision
        return PreparedLinear(
            precision=precision,
            weight=precision.quantize(weight),
            bias=np.concatenate(biases) if any(linear.bias) else None,
        )

    def _member(self, name: str) -> Float32:
        is_targets = name == "lm_head.weight" and not self.head.spec.own_head
        return self._of_target(name) if is_targets else self._own(name)

    def _own(self, name: str) -> Float32:
        tensor: Float32 = self.head.read(name).astype(np.float32, copy=False)
        return tensor

    def _of_target(self, name: str) -> Float32:
        return read_float32(self._checkpoint, name)

    @property
    def _checkpoint(self) -> Checkpoint:
        assert self.target is not None
        return self.target
