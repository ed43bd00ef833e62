"""Recorded generations, for replaying without a model: tokens, and what the verifier held likeliest at each place.

JSON lines. The first one is the header {"trace": 1, "vocab_size": V}; each of the others a generation:
{"category": "", "prompt": [ids], "tokens": [ids], "top": [[ids, likeliest first] per token]}. `top` is empty where the
engine does not tell them.
"""

import json
import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from quasar.errors import GenerationError, PromptError
from runtime.control.control import Control
from runtime.drafters.base import Int64
from runtime.segment import Outcome, Proposal

_VERSION = 1

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

    It holds users' texts as token ids: keep the file accordingly. `category` goes into what is recorded from then on.
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
        with self._lock:
            if not self._begun:
                self._begun = True
                self._line({"trace": _VERSION, "vocab_size": vocab_size})
            self._line(asdict(generation))

    def _line(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")
        self._file.flush()


class RecordingControl:
    """Another control, whose text is written down when `finish` is called."""

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

    def learn(self, outcome: Outcome) -> None:
        """As `Control`."""
        self._tokens += outcome.tokens.tolist()
        if outcome.successors is not None:
            self._top += [tuple(row) for row in outcome.successors[-len(outcome.path) :].tolist()]
        self._control.learn(outcome)

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


def read_trace(path: Path) -> tuple[int, list[TracedGeneration]]:
    """The vocabulary's size and the generations; raises `PromptError` naming a line that does not fit."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read: {error}") from None
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    rows = [_parse(lines[number - 1], f"{path}, line {number}") for number in numbers]
    if not rows or rows[0].get("trace") != _VERSION or not isinstance(rows[0].get("vocab_size"), int):
        raise PromptError(f"{path} is no trace of version {_VERSION}: record one with --record")
    vocab_size = rows[0]["vocab_size"]
    generations = [
        _generation(row, f"{path}, line {number}", vocab_size)
        for number, row in zip(numbers[1:], rows[1:], strict=True)
    ]
    if not generations:
        raise PromptError(f"{path} holds no generation")
    return vocab_size, generations


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise PromptError(f"{where}: a {type(row).__name__} came; an object was expected")
    return row


def _ids(value: Any) -> Int64:
    """Integers, in one list or in lists of one length; raises `ValueError` for anything else."""
    ids = np.array(value)
    if not isinstance(value, list) or (ids.size and ids.dtype.kind != "i"):
        raise ValueError
    return ids.astype(np.int64)


def _generation(row: dict[str, Any], where: str, vocab_size: int) -> TracedGeneration:
    try:
        prompt, tokens, top = (_ids(row[name]) for name in ("prompt", "tokens", "top"))
        fits = prompt.ndim == tokens.ndim == 1 and len(prompt) > 0 and len(tokens) > 0
        fits &= not len(top) or (top.ndim == 2 and len(top) == len(tokens))
        fits &= all(not part.size or 0 <= part.min() <= part.max() < vocab_size for part in (prompt, tokens, top))
    except (KeyError, TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise PromptError(f"{where}: prompt, tokens and top of ids below {vocab_size} were expected")
    return TracedGeneration(
        category=str(row.get("category", "")),
        prompt=tuple(prompt.tolist()),
        tokens=tuple(tokens.tolist()),
        top=tuple(tuple(part) for part in top.tolist()),
    )
