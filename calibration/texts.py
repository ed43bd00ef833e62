"""The texts that a model is calibrated and measured on: prompts, and the float model's own continuations of them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.checkpoints import DecoderSpec
from quasar.errors import BuildError
from quasar.files import sha256_json, write_json
from quasar.text import Prompt, TextCodec, read_prompts

if TYPE_CHECKING:
    import torch

# A prompt contributes at most so many of its tokens, and so many tokens of continuation.
MAX_PROMPT_TOKENS = 512
CALIBRATION_CONTINUATION_TOKENS = 64
MAX_CALIBRATION_PROMPTS = 256
# Many prompts at once read the weights once; their KV cache stays below 1 GiB.
_MAX_BATCH = 64
_MAX_CACHE_BYTES = 1 << 30
# A text this short may stand inside another by chance.
_MIN_CONTAINED_CHARACTERS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """A prompt's tokens (chat template applied) and the float model's greedy continuation of them."""

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
    """The user's calibration prompts (the first 256), or the project's own."""
    return default_prompts("calibration") if path is None else read_prompts(path, limit=MAX_CALIBRATION_PROMPTS)


def fingerprint(prompt: Prompt) -> str:
    """Hash of a prompt's text without regard to case and white space: 16 hex digits."""
    return hashlib.sha256(_normalized(prompt).encode()).hexdigest()[:16]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Hex SHA-256 over the fingerprints of a set of prompts, in order."""
    return sha256_json([fingerprint(prompt) for prompt in prompts])


def refuse_overlap(calibration: Sequence[Prompt], evaluation: Sequence[Prompt], what: str) -> None:
    """Raise `BuildError` if a calibration prompt is, holds, or stands in an evaluation prompt."""
    evaluated = [_normalized(prompt) for prompt in evaluation]
    for number, prompt in enumerate(calibration, start=1):
        text = _normalized(prompt)
        for other in evaluated:
            shorter, longer = sorted((text, other), key=len)
            if text == other or (len(shorter) >= _MIN_CONTAINED_CHARACTERS and shorter in longer):
                raise BuildError(
                    f"calibration prompt {number} ({text[:60]!r}…) is also in {what}: figures measured there would "
                    "flatter the engine; take it out of the calibration file"
                )


def fit_lengths(max_length: int, continuation_tokens: int) -> tuple[int, int]:
    """Tokens of a prompt (at most 512) and of its continuation that fit a context of `max_length` together."""
    continuation = min(continuation_tokens, max_length // 2)
    return min(MAX_PROMPT_TOKENS, max_length - continuation), continuation


def tokenize(prompts: Sequence[Prompt], codec: TextCodec, max_tokens: int) -> list[tuple[int, ...]]:
    """Token ids of each prompt, chat template applied, at most the first `max_tokens`."""
    return [tuple(codec.encode_chat(prompt.messages)[:max_tokens]) for prompt in prompts]


def continue_prompts(
    model: "torch.nn.Module",
    spec: DecoderSpec,
    prompts: Sequence[tuple[int, ...]],
    *,
    num_tokens: int,
    stop_ids: Sequence[int],
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[TokenizedText]:
    """The float model's greedy continuation of each prompt, in batches of similar length, up to one of `stop_ids`."""
    import torch
    from transformers import GenerationConfig

    pad = stop_ids[0] if stop_ids else 0
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=pad
    )
    texts: dict[int, TokenizedText] = {}
    for batch in _batches(spec, [len(prompt) + num_tokens for prompt in prompts]):
        longest = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        with torch.inference_mode():
            generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        for row, index in enumerate(batch):
            new = generated[row, longest:].tolist()
            end = next((place + 1 for place, token in enumerate(new) if token in stop_ids), len(new))
            texts[index] = TokenizedText(prompt=prompts[index], continuation=tuple(new[:end]))
        on_batch(len(batch))
    return [texts[index] for index in range(len(prompts))]


def _batches(spec: DecoderSpec, lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences of similar length, as many at once as the bound on their KV cache allows."""
    position_bytes = sum(2 * layer.attention.kv_size * 4 for layer in spec.layers)
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        fits = _MAX_CACHE_BYTES // (position_bytes * lengths[index])
        if batches and len(batches[-1]) < min(_MAX_BATCH, fits):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


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
