"""The manifest's `text`: an engine's tokenizer and chat templates, and the tokens that matter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engines.fields import check_fields
from quasar.errors import DamagedEngineError
from quasar.text.chat_template import DEFAULT_DATE


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """Tokenizer and chat templates, as paths in the engine directory, and the special tokens that matter.

    `named_templates`: further templates, name → path. `end_tokens`: the end ids with their spelling and where each is
    from; empty in engines of earlier versions. `date`: what a template is told where the caller gives no date.
    """

    tokenizer: str
    chat_template: str
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]
    named_templates: dict[str, str] = field(default_factory=dict)
    end_tokens: tuple[dict[str, Any], ...] = ()
    date: str = DEFAULT_DATE

    @property
    def names(self) -> tuple[str, ...]:
        """Every file; "" for a template that is not there."""
        return (self.tokenizer, self.chat_template, *self.named_templates.values())

    def to_json(self) -> dict[str, Any]:
        """The manifest's `text`; an empty chat_template means that the checkpoint has none."""
        return {
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "eos_token_ids": list(self.eos_token_ids),
            # Left out where there is nothing to say, as in engines of earlier versions, whose hash they would change.
            **({"named_templates": self.named_templates} if self.named_templates else {}),
            **({"end_tokens": list(self.end_tokens)} if self.end_tokens else {}),
            **({"date": self.date} if self.date != DEFAULT_DATE else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TextFiles":
        """Read it; raises `DamagedEngineError` naming what does not fit."""
        stops = value.get("eos_token_ids")
        if not isinstance(stops, list) or not all(isinstance(stop, int) for stop in stops):
            raise DamagedEngineError(f"manifest.json: text.eos_token_ids is {stops!r}; a list of integers was expected")
        optional = {
            name: kind
            for name, kind in (("named_templates", dict), ("end_tokens", list), ("date", str))
            if name in value
        }
        checked = check_fields(
            "text",
            {name: item for name, item in value.items() if name != "eos_token_ids"},
            {"tokenizer": str, "chat_template": str, "bos_token": str, "eos_token": str, **optional},
        )
        for name, path in checked.get("named_templates", {}).items():
            if not isinstance(path, str) or not path:
                raise DamagedEngineError(f"manifest.json: text.named_templates[{name!r}] is {path!r}; a file expected")
        for one in checked.get("end_tokens", []):
            if not isinstance(one, dict) or one.keys() != {"id", "token", "sources"}:
                raise DamagedEngineError(f"manifest.json: text.end_tokens holds {one!r}; id, token, sources expected")
        checked["end_tokens"] = tuple(checked.get("end_tokens", ()))
        return cls(eos_token_ids=tuple(stops), **checked)
