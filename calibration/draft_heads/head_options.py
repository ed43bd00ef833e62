"""What a user chooses for the training of a draft head, and who hears of its progress."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quasar.errors import BuildError

DEFAULT_MINUTES = 60.0
# Below it, loading and measuring take most of the time.
LEAST_MINUTES = 1.0
# Of the user's: fewer of them make a head that knows little else.
LEAST_PROMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainHeadOptions:
    """What the user chose.

    `prompts`: whose answers the head learns from; None: the model writes them itself. `excluded`: further prompts
    that no text may have in common with those. `draft_vocab` and `intermediate_size` None: chosen. `model`: where the
    target's float weights are; None: where the engine was built from. `data`: a folder that keeps the generated text;
    None: it is deleted when the head is done. `tokens`, `updates`: amounts that take the place of `minutes`.
    """

    directory: Path
    output: Path
    prompts: Path | None = None
    excluded: Path | None = None
    minutes: float = DEFAULT_MINUTES
    draft_vocab: int | None = None
    intermediate_size: int | None = None
    model: str | None = None
    data: Path | None = None
    tokens: int | None = None
    updates: int | None = None
    seed: int = 0


class TrainingReporter(Protocol):
    """Hears how a draft head is made."""

    def stage(self, title: str, detail: str = "") -> None:
        """A stage begins, or has come so far."""


def check_head_options(options: TrainHeadOptions) -> None:
    """Raise `BuildError` for what no training can have."""
    # What is no number is not below the least one.
    if not (math.isfinite(options.minutes) and options.minutes >= LEAST_MINUTES):
        raise BuildError(
            f"--minutes is {options.minutes:g}; {LEAST_MINUTES:g} or more was expected, and 60 for a head of use"
        )
    for name, value, least in (
        ("--draft-vocab", options.draft_vocab, 16),
        ("--intermediate-size", options.intermediate_size, 16),
        ("--tokens", options.tokens, 256),
        ("--updates", options.updates, 1),
    ):
        if value is not None and value < least:
            raise BuildError(f"{name} is {value}; {least} or more was expected")
    if not 0 <= options.seed < 1 << 31:
        raise BuildError(f"--seed is {options.seed}; 0 to {(1 << 31) - 1} was expected")
    if options.output.exists() or options.output.is_symlink():
        raise BuildError(f"{options.output} exists: it is never overwritten, choose another -o")
