"""What ends a generation from outside: its deadline, or whoever cancels it."""

import time

from runtime.generation_options import GenerationOptions
from runtime.stopping import CANCELLED, DEADLINE


class Interruption:
    """Why a generation has to end early, if it has to; the first reason stays."""

    def __init__(self, options: GenerationOptions, called_at: float | None = None) -> None:
        """`called_at`: when the generation was asked for (`time.monotonic`), if that was not now."""
        start = time.monotonic() if called_at is None else called_at
        self._cancel = options.cancel
        self._ends_at = None if options.deadline is None else start + options.deadline
        self._reason: str | None = None

    def __call__(self) -> str | None:
        """The reason, or None while the generation goes on."""
        if self._reason is None:
            if self._cancel is not None and self._cancel.is_set():
                self._reason = CANCELLED
            elif self._ends_at is not None and time.monotonic() >= self._ends_at:
                self._reason = DEADLINE
        return self._reason
