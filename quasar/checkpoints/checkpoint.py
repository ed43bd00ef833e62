"""What every checkpoint offers, whatever its file format."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.checkpoint_text import CheckpointText
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.checkpoints.spec import DecoderSpec
from quasar.errors import CheckpointError
from quasar.files import sha256_file, sha256_json


class Checkpoint(Protocol):
    """A decoder's spec and its weights, read one tensor at a time."""

    @property
    def spec(self) -> DecoderSpec:
        """What the decoder is."""

    @property
    def location(self) -> Path:
        """The folder or file that the weights come from."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the weights and the config come from, sorted; their hashes name the checkpoint."""

    @property
    def quantized_by(self) -> str:
        """What quantized a folder's weights, as messages call it; "" where they are floats, and for GGUF files."""

    def read(self, name: str) -> NDArray[Any]:
        """One tensor by canonical name, in the precision it is stored in (dequantized weights: float32)."""

    def prequantized(self, name: str) -> PrequantizedWeight | None:
        """A linear's weight on the grid that the checkpoint has it on, by the canonical name of its tensor.

        None where it is stored as floats, or on another grid than scales, and at most offsets, of groups of inputs.
        """

    def transformers_config(self) -> Any:
        """The transformers config of the same model, for the float reference."""

    def text(self) -> CheckpointText:
        """Tokenizer, chat templates, end tokens and sampling defaults.

        Raises `CheckpointError` if there is no tokenizer, or one that the runtime could not read.
        """


def at_length(checkpoint: Checkpoint, max_length: int) -> Checkpoint:
    """The checkpoint for sequences of up to `max_length` positions: itself, unless a rope depends on that."""
    spec = checkpoint.spec.at_length(max_length)
    return checkpoint if spec is checkpoint.spec else WithSpec(checkpoint, spec)


class WithSpec:
    """A checkpoint with another spec of the same tensors."""

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec) -> None:
        self._checkpoint = checkpoint
        self.spec = spec

    @property
    def location(self) -> Path:
        """As `Checkpoint`."""
        return self._checkpoint.location

    @property
    def files(self) -> tuple[Path, ...]:
        """As `Checkpoint`."""
        return self._checkpoint.files

    @property
    def quantized_by(self) -> str:
        """As `Checkpoint`."""
        return self._checkpoint.quantized_by

    def read(self, name: str) -> NDArray[Any]:
        """As `Checkpoint`."""
        return self._checkpoint.read(name)

    def prequantized(self, name: str) -> PrequantizedWeight | None:
        """As `Checkpoint`."""
        return self._checkpoint.prequantized(name)

    def transformers_config(self) -> Any:
        """As `Checkpoint`."""
        return self._checkpoint.transformers_config()

    def text(self) -> CheckpointText:
        """As `Checkpoint`."""
        return self._checkpoint.text()


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 over the names and hashes of the checkpoint's files."""
    return sha256_json({path.name: sha256_file(path) for path in checkpoint.files})


def read_head(checkpoint: Checkpoint) -> NDArray[Any]:
    """The LM head's weight [vocabulary, hidden]: the embedding when tied."""
    return checkpoint.read("embed_tokens.weight" if checkpoint.spec.tied_head else "lm_head.weight")


def prequantized_linear(checkpoint: Checkpoint, member: str) -> PrequantizedWeight | None:
    """A projection's weight by its name without `.weight`; `lm_head` resolves to the embedding when tied."""
    if member == "lm_head" and checkpoint.spec.tied_head:
        member = "embed_tokens"
    return checkpoint.prequantized(f"{member}.weight")


def read_float32(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """One tensor by canonical name as float32; `lm_head.weight` resolves to the embedding when tied."""
    tensor = read_head(checkpoint) if name == "lm_head.weight" else checkpoint.read(name)
    return check_finite(checkpoint, name, tensor.astype(np.float32, copy=False))


def check_finite(checkpoint: Checkpoint, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
    """The tensor itself; raises `CheckpointError` naming it and the first place that holds NaN or infinity."""
    if np.isfinite(tensor).all():
        return tensor
    place = np.argwhere(~np.isfinite(tensor))[0].tolist()
    raise CheckpointError(
        f"{checkpoint.location}: {name} holds {float(tensor[tuple(place)])} at {place}; finite weights were expected: "
        "the checkpoint is damaged"
    )
