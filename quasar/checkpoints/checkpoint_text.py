"""What a checkpoint says of text: tokenizer, chat templates, the tokens that end a sequence, sampling defaults."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quasar.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Options of a generation that a checkpoint may have a default for.
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_INTEGERS = ("top_k",)

# Names of tokens that end a sequence or a turn, in the vocabularies that are in use (llama.cpp keeps such a list, too).
END_TOKEN_NAMES = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "</s>"),
        *("<end_of_turn>", "<|end_of_turn|>", "<|endofturn|>", "<end_of_utterance>", "<|return|>", "<EOT>", "<|EOT|>"),
        *("<｜end▁of▁sentence｜>", "<eos>", "[EOT]", "[EOS]", "_<EOT>", "<|eot|>"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToken:
    """A token that ends a sequence: id, how it is spelled, and every place that says so."""

    token_id: int
    token: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointText:
    """A checkpoint's tokenizer and what goes with it.

    `chat_templates`: Jinja by name, "default" first where there is one. `end_ids`: id → the places that name it as the
    end of a sequence, without the template's. `sampling`: defaults by option (SAMPLING_DEFAULTS); temperature 0 where
    the checkpoint does not draw.
    """

    tokenizer: "Tokenizer"
    chat_templates: Mapping[str, str]
    bos_token: str
    eos_token: str
    end_ids: Mapping[int, tuple[str, ...]]
    sampling: Mapping[str, float | int] = field(default_factory=dict)


def end_ids(found: Iterable[tuple[str, Any]]) -> dict[int, tuple[str, ...]]:
    """Token id → the places that name it, from (place, an id, a list of ids or None) in order.

    Raises `CheckpointError` naming a place that holds something else.
    """
    places: dict[int, list[str]] = {}
    for place, value in found:
        for item in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
            if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                raise CheckpointError(f"{place} is {value!r}; token ids were expected")
            places.setdefault(item, []).append(place)
    return {token: tuple(dict.fromkeys(names)) for token, names in places.items()}


def sampling_defaults(values: Mapping[str, Any], *, draws: bool) -> dict[str, float | int]:
    """The defaults among `values`, by the names of our options; what is not a number is passed over.

    `draws`: whether the checkpoint draws tokens at all (transformers' `do_sample`).
    """
    found: dict[str, float | int] = {}
    for name in SAMPLING_DEFAULTS:
        value = values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = int(value) if name in _INTEGERS else float(value)
    if found and not draws:
        found["temperature"] = 0.0
    elif draws:
        # transformers' own defaults hold where its file is silent.
        found.setdefault("temperature", 1.0)
    return found


def chat_templates(value: Any) -> dict[str, str]:
    """Templates by name, from a string, a mapping, or a list of {name, template}; empty ones are left out."""
    if isinstance(value, str):
        named = {"default": value}
    elif isinstance(value, Mapping):
        named = {str(name): str(source) for name, source in value.items()}
    else:
        named = {str(one["name"]): str(one["template"]) for one in value or ()}
    return {name: source for name, source in named.items() if source}
