"""Prompt files: JSONL with a row of `prompt`, `messages` or Spec-Bench's `turns`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quasar.errors import PromptError
from quasar.text.messages import Message, check_messages, content_of

_ROW = 'a row is {"prompt": "…"}, {"messages": [{"role": "user", "content": "…"}]} or {"turns": ["…"]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: a conversation that ends with the user's turn, and the category it is reported under.

    `later_turns`: what the user says after the answers. `reference`: a known answer to score against, or "".
    `answer`: what a good assistant answers, or "": calibration and fidelity read it after the prompt.
    """

    messages: tuple[Message, ...]
    category: str = ""
    reference: str = ""
    later_turns: tuple[str, ...] = ()
    answer: str = ""

    @property
    def text(self) -> str:
        """What the messages say, without the template: for comparing sets of prompts."""
        return "\n".join(content_of(message) for message in self.messages)


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a JSONL file, or `limit` of them (see `in_turn`); blank lines are passed over.

    Raises `PromptError` for a missing or empty file, or naming the line that cannot be used.
    """
    try:
        # Windows editors write a byte order mark.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist; a JSONL file of prompts was expected") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read as UTF-8 text ({error})") from None
    prompts = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise PromptError(f"{path} holds no prompts; {_ROW}")
    return prompts if limit is None else in_turn(prompts, limit)


def in_turn(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """`limit` prompts, one from each category in turn, so that a short run sees every kind; file order is kept."""
    if limit < 1:
        raise PromptError(f"a limit of {limit} prompts came; 1 or more was expected")
    return [prompts[index] for index in sorted(turn_order(prompts)[:limit])]


def turn_order(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of all prompts, one from each category in turn."""
    by_category: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_category.setdefault(prompt.category, []).append(index)
    return [index for row in zip_longest(*by_category.values()) for index in row if index is not None]


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON ({error.msg} at column {error.colno}); {_ROW}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: JSON that cannot be read ({error}); {_ROW}") from None
    if not isinstance(row, dict):
        raise PromptError(f"{where}: a {type(row).__name__} came; {_ROW}")
    return Prompt(
        messages=_messages(row, where),
        category=str(row.get("category", "")),
        reference=_reference(row.get("reference")),
        later_turns=_later_turns(row),
        answer=_answer(row, where),
    )


def _messages(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    if isinstance(row.get("prompt"), str):
        return ({"role": "user", "content": row["prompt"]},)
    turns = row.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return ({"role": "user", "content": turns[0]},)
    if "messages" in row:
        return check_messages(row["messages"], where)
    raise PromptError(f"{where}: none of the keys prompt, messages, turns holds text; {_ROW}")


def _answer(row: dict[str, Any], where: str) -> str:
    answer = row.get("answer", "")
    if not isinstance(answer, str):
        raise PromptError(f"{where}: the key answer holds a {type(answer).__name__}; text was expected")
    return answer


def _later_turns(row: dict[str, Any]) -> tuple[str, ...]:
    """The turns after the first one, where the row is one of turns."""
    if isinstance(row.get("prompt"), str) or not isinstance(row.get("turns"), list):
        return ()
    return tuple(turn for turn in row["turns"][1:] if isinstance(turn, str))


def _reference(value: Any) -> str:
    """A text, or the first one of a list: the first turn's."""
    while isinstance(value, list):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""
