"""Recorded generations, for replaying without a model: tokens, and what the verifier held likeliest at each place.

JSON lines. The first one is the header {"trace": 1, "vocab_size": V}; each of the others a generation:
{"category": "", "prompt": [ids], "tokens": [ids], "top": [[ids, likeliest first] per token]}. `top` is empty where the
engine does not tell them.
"""

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quasar.errors import GenerationError
from runtime.control.candidates import Prepared
from runtime.control.control import Control
from runtime.control.latency import Threshold
from runtime.drafters.base import Float32, Int64
from runtime.segment import Outcome, Proposal

TRACE_VERSION = 1

_log = logging.getLogger("quasar.runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGeneration:
    """One recorded generation. `top` has the verifier's likeliest tokens at the place of each of `tokens`."""

    category: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    top: tuple[tuple[int, ...], ...]


class Recorder:
    """Writes generations to a file as they end; what stands there is replaced. A context manager. Thread-safe.

    It holds users' prompts and answers as token ids: keep the file accordingly. `category` goes into what is recorded
    from then on.
    """

    def __init__(self, path: str | Path) -> None:
        self.category = ""
        self._path = Path(path)
        self._begun = False
        self._lock = threading.Lock()
        try:
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise GenerationError(f"{path} cannot be written: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write(self, generation: TracedGeneration, vocab_size: int) -> None:
        """Append a generation of an engine with this vocabulary."""
        header, line = _line({"trace": TRACE_VERSION, "vocab_size": vocab_size}), _line(asdict(generation))
        with self._lock:
            if not self._begun:
                self._begun = True
                line = header + line
            self._file.write(line)
            self._file.flush()


def _line(value: dict[str, Any]) -> str:
    """Made before the lock is taken: the garbage collector may run here, and end another generation in this thread."""
    return json.dumps(value, separators=(",", ":")) + "\n"


class RecordingControl:
    """Another control, whose sequence is written when `finish` is called."""

    def __init__(self, control: Control, recorder: Recorder, vocab_size: int) -> None:
        self._control, self._recorder, self._vocab_size = control, recorder, vocab_size
        self._category = recorder.category
        self._prompt: list[int] = []
        self._tokens: list[int] = []
        self._top: list[tuple[int, ...]] = []

    def begin(self, prompt: Int64, first: int, successors: Int64 | None) -> None:
        """As `Control`."""
        self._prompt, self._tokens = prompt.tolist(), [first]
        if successors is not None:
            self._top.append(tuple(successors[0].tolist()))
        self._control.begin(prompt, first, successors)

    def propose(self, context: Int64, most: int, cache_length: int) -> Proposal:
        """As `Control`."""
        return self._control.propose(context, most, cache_length)

    def asks(self, threshold: Threshold) -> bool:
        """As `Control`."""
        return self._control.asks(threshold)

    def prepare(self, context: Int64, most: int, cache_length: int) -> Prepared | None:
        """As `Control`."""
        return self._control.prepare(context, most, cache_length)

    def settle(self, chosen: Sequence[int], *, tokens: float, seconds: float, gain: float) -> Proposal:
        """As `Control`."""
        return self._control.settle(chosen, tokens=tokens, seconds=seconds, gain=gain)

    def learn(self, outcome: Outcome) -> None:
        """As `Control`."""
        self._tokens += outcome.tokens.tolist()
        if outcome.successors is not None:
            self._top += [tuple(row) for row in outcome.successors[-len(outcome.path) :].tolist()]
        self._control.learn(outcome)

    def see(self, tokens: Int64, first: int, hidden_states: Sequence[Float32]) -> None:
        """As `Control`."""
        self._control.see(tokens, first, hidden_states)

    def finish(self) -> None:
        """Write what was generated, if anything was; a file that is closed or full ends no answer."""
        if not self._tokens:
            return
        generation = TracedGeneration(
            category=self._category,
            prompt=tuple(self._prompt),
            tokens=tuple(self._tokens),
            top=tuple(self._top),
        )
        try:
            self._recorder.write(generation, self._vocab_size)
        except (OSError, ValueError) as error:
            _log.warning("a generation could not be recorded: %s", error)
