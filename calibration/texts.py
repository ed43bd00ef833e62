"""The texts that a model is calibrated and measured on: prompts, and what a good assistant answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from itertools import accumulate
from pathlib import Path
from typing import Any

from quasar.errors import BuildError
from quasar.files import sha256_json, write_json
from quasar.text import Prompt, TextCodec, read_prompts
from quasar.text.prompts import turn_order

# A prompt contributes at most so many of its tokens, and so many tokens of its answer.
MAX_PROMPT_TOKENS = 512
CALIBRATION_ANSWER_TOKENS = 64
EVALUATION_ANSWER_TOKENS = 32
MAX_CALIBRATION_PROMPTS = 256
# Two slow cores do nearly 1e11 operations a second: less than a minute of float passes. Fewer tokens say too little of
# what activations look like; more of them say little that is new.
_OPERATIONS = 4_000_000_000_000
_FEWEST_TOKENS = 1024
_MOST_TOKENS = 4096
# A text this short may stand inside another by chance.
_MIN_CONTAINED_CHARACTERS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """A prompt's tokens (chat template applied) and the first ones of what follows: its answer, or none."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and continuation."""
        return self.prompt + self.continuation


def default_prompts(name: str) -> list[Prompt]:
    """The prompts that the project ships: "calibration" or "evaluation"."""
    with as_file(files("calibration") / "data" / f"{name}.jsonl") as path:
        return read_prompts(path)


def calibration_prompts(path: Path | None) -> list[Prompt]:
    """The user's calibration prompts (at most 256, one from each category in turn), or the project's own."""
    return default_prompts("calibration") if path is None else read_prompts(path, limit=MAX_CALIBRATION_PROMPTS)


def fingerprint(prompt: Prompt) -> str:
    """Hash of a prompt's text without regard to case and white space: 16 hex digits."""
    return hashlib.sha256(_normalized(prompt).encode()).hexdigest()[:16]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Hex SHA-256 over the fingerprints and answers of a set of prompts, in order."""
    return sha256_json([[fingerprint(prompt), prompt.answer] for prompt in prompts])


def inputs_hash(prompts: Sequence[Prompt]) -> str:
    """Hex SHA-256 over all that a build reads of a set of prompts: every character, roles and categories too."""
    return sha256_json([[list(map(dict, prompt.messages)), prompt.category, prompt.answer] for prompt in prompts])


def refuse_overlap(
    prompts: Sequence[Prompt],
    others: Sequence[Prompt],
    what: str,
    *,
    kind: str = "calibration prompt",
    flattered: str = "the engine",
    source: str = "the calibration file",
) -> None:
    """Raise `BuildError` if a prompt is, holds, or stands in one of the others, which are `what`.

    `kind`, `flattered`, `source`: what the prompts are, what learns from them, and where they are, for the message.
    """
    for number, prompt in enumerate(prompts, start=1):
        if overlaps(prompt, others):
            raise BuildError(
                f"{kind} {number} ({_normalized(prompt)[:60]!r}…) is also in {what}: figures measured "
                f"there would flatter {flattered}; take it out of {source}"
            )


def overlaps(prompt: Prompt, others: Sequence[Prompt]) -> bool:
    """Whether a prompt is, holds, or stands in another, without regard to case and white space."""
    text = _normalized(prompt)
    for other in map(_normalized, others):
        shorter, longer = sorted((text, other), key=len)
        if text == other or (len(shorter) >= _MIN_CONTAINED_CHARACTERS and shorter in longer):
            return True
    return False


def fit_lengths(max_length: int, continuation_tokens: int) -> tuple[int, int]:
    """Tokens of a prompt (at most 512) and of its continuation that fit a context of `max_length` together."""
    continuation = min(continuation_tokens, max_length // 2)
    return min(MAX_PROMPT_TOKENS, max_length - continuation), continuation


def tokenize(
    prompts: Sequence[Prompt], codec: TextCodec, *, prompt_tokens: int, answer_tokens: int
) -> list[TokenizedText]:
    """Each prompt, chat template applied, and its answer as the assistant's turn: at most so many tokens of either."""
    return [
        TokenizedText(
            prompt=tuple(codec.encode_chat(prompt.messages)[:prompt_tokens]),
            continuation=tuple(codec.encode_answer(prompt.answer)[:answer_tokens]) if prompt.answer else (),
        )
        for prompt in prompts
    ]


def calibration_tokens(num_parameters: int) -> int:
    """How many tokens of calibration text a model of that size is given: less than a minute of passes, 1024 to 4096."""
    return min(max(_OPERATIONS // (2 * num_parameters), _FEWEST_TOKENS), _MOST_TOKENS)


def fit_texts(
    prompts: Sequence[Prompt], texts: Sequence[TokenizedText], max_tokens: int
) -> tuple[list[Prompt], list[TokenizedText]]:
    """The prompts, and their texts, that fit `max_tokens` in all: one from each category in turn, in file order.

    A text is kept whole or dropped; the first one is always kept.
    """
    order = turn_order(prompts)
    totals = accumulate(len(texts[index].tokens) for index in order)
    fitting = max(1, sum(total <= max_tokens for total in totals))
    kept = sorted(order[:fitting])
    return [prompts[index] for index in kept], [texts[index] for index in kept]


def _normalized(prompt: Prompt) -> str:
    return " ".join(prompt.text.casefold().split())


def describe_texts(texts: Sequence[TokenizedText], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a manifest says about its calibration text."""
    return {
        "prompts": len(texts),
        "continuation_tokens": sum(len(text.continuation) for text in texts),
        "prompts_sha256": prompts_hash(prompts),
        "prompt_fingerprints": [fingerprint(prompt) for prompt in prompts],
    }


def write_texts(path: Path, texts: Sequence[TokenizedText]) -> None:
    """Keep texts for a later stage of a build."""
    write_json(path, [asdict(text) for text in texts])


def read_texts(path: Path) -> list[TokenizedText]:
    """What `write_texts` wrote."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [TokenizedText(prompt=tuple(one["prompt"]), continuation=tuple(one["continuation"])) for one in entries]
