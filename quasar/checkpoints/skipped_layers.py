"""A checkpoint without some of its layers: a cheaper, worse model of the same vocabulary, for drafting."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quasar.checkpoints.checkpoint import Checkpoint
from quasar.checkpoints.spec import DecoderSpec
from quasar.errors import CheckpointError

_LAYER = re.compile(r"layers\.(\d+)\.")
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that "3,10-19" names, ascending; "" names none.

    Raises `CheckpointError` for what cannot be read, a layer that the model lacks, or all of them.
    """
    layers: set[int] = set()
    for part in text.split(",") if text else []:
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise CheckpointError(f"layers to skip are {text!r}; numbers and ranges were expected, as in 3,10-19")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_layers:
            raise CheckpointError(f"layers to skip are {part.strip()}; the model has layers 0 to {num_layers - 1}")
        layers |= set(range(first, last + 1))
    if len(layers) == num_layers:
        raise CheckpointError("all layers were to be skipped; at least one must stay")
    return tuple(sorted(layers))


def skip_layers(checkpoint: Checkpoint, text: str) -> Checkpoint:
    """The checkpoint without the layers that `text` names (`parse_layers`); itself for ""."""
    layers = parse_layers(text, checkpoint.spec.num_layers)
    return SkippedLayers(checkpoint, layers) if layers else checkpoint


class SkippedLayers:
    """As `Checkpoint`: the layers that stay are numbered anew, and each reads what the one before it wrote."""

    def __init__(self, checkpoint: Checkpoint, skipped: tuple[int, ...]) -> None:
        self._checkpoint = checkpoint
        # New number of a layer → its own.
        self.kept = tuple(layer for layer in range(checkpoint.spec.num_layers) if layer not in skipped)

    @property
    def spec(self) -> DecoderSpec:
        """What is left of the decoder."""
        return replace(self._checkpoint.spec, num_layers=len(self.kept))

    @property
    def location(self) -> Path:
        """As the whole checkpoint's."""
        return self._checkpoint.location

    @property
    def files(self) -> tuple[Path, ...]:
        """As the whole checkpoint's."""
        return self._checkpoint.files

    def read(self, name: str) -> NDArray[Any]:
        """One tensor by its new name."""
        return self._checkpoint.read(_LAYER.sub(lambda found: f"layers.{self.kept[int(found[1])]}.", name))

    def transformers_config(self) -> Any:
        """The config of what is left."""
        config = copy.deepcopy(self._checkpoint.transformers_config())
        config.num_hidden_layers = len(self.kept)
        types = getattr(config, "layer_types", None)
        if types is not None:
            config.layer_types = [types[layer] for layer in self.kept]
        return config

    def transformers_tokenizer(self) -> Any:
        """As the whole checkpoint's."""
        return self._checkpoint.transformers_tokenizer()
