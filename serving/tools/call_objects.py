"""Calls as OpenAI writes them: in the message of a whole answer, and in the deltas of a stream."""

import secrets
from typing import Any

from serving.tools.call_parser import CallParser, CallPiece, CallRules, TextPiece, parse_answer


def call_id() -> str:
    """A new name for a call."""
    return f"call_{secrets.token_hex(12)}"


def finish_reason_of(reason: str | None, *, calls: int, whole: bool) -> str | None:
    """The answer's `finish_reason`: calls end it unless something else has cut it."""
    return "tool_calls" if reason == "stop" and calls and whole else reason


def message_of(text: str, rules: CallRules, reason: str | None) -> tuple[dict[str, Any], str | None]:
    """(the fields of a message that depend on calls, `finish_reason`) of a whole answer."""
    answer = parse_answer(text, rules)
    content = answer.text if answer.text or not answer.calls else None
    message: dict[str, Any] = {"content": content}
    if answer.calls:
        message["tool_calls"] = [
            {"id": call_id(), "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in answer.calls
        ]
    return message, finish_reason_of(reason, calls=len(answer.calls), whole=answer.whole)


class CallDeltas:
    """The deltas of one streamed answer, in order."""

    def __init__(self, rules: CallRules) -> None:
        self._parser = CallParser(rules)

    def of(self, text: str, *, ends: bool) -> list[dict[str, Any]]:
        """The deltas that the next text completes; `ends`: it is the last one."""
        pieces = self._parser.push(text)
        if ends:
            pieces += self._parser.finish()
        return [_delta(piece) for piece in pieces]

    def finish_reason(self, reason: str | None) -> str | None:
        """The answer's `finish_reason`, after its last delta."""
        return finish_reason_of(reason, calls=self._parser.calls, whole=self._parser.whole)


def _delta(piece: TextPiece | CallPiece) -> dict[str, Any]:
    if isinstance(piece, TextPiece):
        return {"content": piece.text}
    call: dict[str, Any] = {"index": piece.index}
    if piece.name is not None:
        call |= {"id": call_id(), "type": "function"}
    function = {} if piece.name is None else {"name": piece.name}
    return {"tool_calls": [{**call, "function": {**function, "arguments": piece.arguments}}]}
