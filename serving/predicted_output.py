"""Predicted outputs: OpenAI's field `prediction`, and what `usage` says of it."""

from collections.abc import Sequence
from typing import Any

from runtime import Stats
from serving.api_errors import invalid
from serving.chat_messages import read_text
from serving.request_fields import Field, inner, table_of, wrong


def _kind(name: str, value: Any) -> str:
    if value != "content":
        raise wrong(name, value, "'content'")
    return "content"


_READ = inner(table_of(Field(name="type", read=_kind), Field(name="content", read=read_text)))


def read_prediction(name: str, value: Any) -> str:
    """The text of `{"type": "content", "content": a string or text parts}`."""
    fields = _READ(name, value)
    for part in ("type", "content"):
        if part not in fields:
            raise invalid(f"{name}.{part}", f"{name}.{part} is missing", "missing_required_parameter")
    text: str = fields["content"]
    return text


def prediction_details(stats: Sequence[Stats]) -> dict[str, int]:
    """Drafts from the prediction that were accepted, and that were verified and not accepted, of all answers."""
    return {
        "accepted_prediction_tokens": sum(one.accepted_prediction_tokens for one in stats),
        "rejected_prediction_tokens": sum(one.rejected_prediction_tokens for one in stats),
    }
