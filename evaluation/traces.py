"""Reading recorded generations; `runtime.traces` writes them, and says what a file holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from quasar.errors import PromptError
from runtime.drafters.base import Int64
from runtime.traces import TRACE_VERSION, TracedGeneration


def read_trace(path: Path) -> tuple[int, list[TracedGeneration]]:
    """The vocabulary's size and the generations; raises `PromptError` naming a line that does not fit."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read: {error}") from None
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    rows = [_parse(lines[number - 1], f"{path}, line {number}") for number in numbers]
    if not rows or rows[0].get("trace") != TRACE_VERSION or not isinstance(rows[0].get("vocab_size"), int):
        raise PromptError(f"{path} is no trace of version {TRACE_VERSION}: record one with --record")
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
