"""How a folder of safetensors holds quantized weights: what every layout says of itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.errors import CheckpointError


class Layout(Protocol):
    """A layout with the choices of one checkpoint's `quantization_config`."""

    @property
    def method(self) -> str:
        """What messages call it."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of the tensors beside or in place of a module's weight, after the module's own."""

    @property
    def key(self) -> str:
        """The part without which a module is not quantized."""

    def shape(self, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """[outputs, inputs] of a weight by the shapes of its parts."""

    def weight(self, tensors: Mapping[str, NDArray[Any]], where: str) -> PrequantizedWeight:
        """The weight of a module's tensors, by part.

        Raises `CheckpointError`, beginning with `where`, for tensors that contradict each other or the config.
        """


def expect_shapes(tensors: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise `CheckpointError` naming a part that is missing or has another shape than the config asks for."""
    for part, shape in shapes.items():
        if part not in tensors:
            raise CheckpointError(f"{where} lacks {part}: download the checkpoint again")
        if tensors[part].shape != shape:
            raise CheckpointError(
                f"{where}.{part} has shape {list(tensors[part].shape)}; quantization_config asks for {list(shape)}"
            )


def expect_words(tensors: Mapping[str, NDArray[Any]], parts: Sequence[str], where: str) -> None:
    """Raise `CheckpointError` naming a part that is not of 32-bit words."""
    for part in parts:
        if tensors[part].dtype != np.int32:
            raise CheckpointError(f"{where}.{part} is stored as {tensors[part].dtype}; int32 was expected")


def as_float32(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Scales of any float type."""
    return np.ascontiguousarray(numbers).astype(np.float32)


def in_order(values: NDArray[np.int8], group_of: NDArray[Any] | None, num_groups: int, where: str) -> bool:
    """Whether inputs' groups (`g_idx`, integers [inputs]) follow one another.

    Raises `CheckpointError` for what are no such groups.
    """
    if group_of is None:
        return True
    inputs = values.shape[1]
    if group_of.shape != (inputs,) or group_of.dtype.kind not in "iu":
        raise CheckpointError(f"{where}: the groups of {inputs} inputs were expected, {group_of.shape} came")
    if group_of.min() < 0 or group_of.max() >= num_groups:
        raise CheckpointError(f"{where}: an input is of group {int(group_of.max())}; there are {num_groups}")
    return inputs % num_groups == 0 and np.array_equal(group_of, np.arange(inputs) // (inputs // num_groups))
