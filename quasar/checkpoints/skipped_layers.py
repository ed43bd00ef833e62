"""Layers that are left out of an engine, and the names of those that stay: a faster, worse model for drafting."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from quasar.checkpoints.spec import split_name
from quasar.errors import CheckpointError

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")

Value = TypeVar("Value")


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


def remaining_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that stay, ascending: their own numbers by their new ones. Raises as `parse_layers`."""
    skipped = parse_layers(text, num_layers)
    return tuple(layer for layer in range(num_layers) if layer not in skipped)


def own_name(name: str, remaining: Sequence[int]) -> str:
    """What a tensor or linear is called in the whole model, by its name among the layers that stay."""
    layer, part = split_name(name)
    return name if layer is None else f"layers.{remaining[layer]}.{part}"


def renumbered(by_name: Mapping[str, Value], remaining: Sequence[int]) -> dict[str, Value]:
    """What is known by the whole model's names, by those among the layers that stay; the others are dropped."""
    numbers = {own: new for new, own in enumerate(remaining)}
    found: dict[str, Value] = {}
    for name, value in by_name.items():
        layer, part = split_name(name)
        if layer is None:
            found[name] = value
        elif layer in numbers:
            found[f"layers.{numbers[layer]}.{part}"] = value
    return found
