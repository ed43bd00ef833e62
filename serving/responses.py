"""From the runtime's events to OpenAI's objects: whole answers, and chunks of streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quasar.text import TextCodec
from runtime import Event, Round, Stats
from serving.api_request import ApiRequest
from serving.predicted_output import prediction_details
from serving.round_objects import RoundObjects
from serving.token_logprobs import CompletionLogprobs, chat_logprobs
from serving.tools.call_objects import CallDeltas, message_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What every object of one answer has in common; `prompt_ids`: of each prompt, where they were asked for."""

    id: str
    created: int
    model: str
    fingerprint: str
    prompt_ids: Sequence[Sequence[int]] = ()

    def to_json(self, kind: str) -> dict[str, Any]:
        """The common fields of an object of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True, kw_only=True)
class Choice:
    """One of the answers to a request, while its events come. `rounds`: kept where it begins as a list."""

    index: int
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None
    rounds: list[Round] | None = None

    def add(self, event: Event) -> None:
        """Take an event in."""
        self.text.append(event.text)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        if self.rounds is not None:
            self.rounds.append(event.round)
        if event.finish_reason is not None:
            self.finish_reason, self.stats = event.finish_reason, event.stats


def usage_of(choices: Sequence[Choice], request: ApiRequest) -> dict[str, Any]:
    """OpenAI's usage: a prompt counts once, however many answers it gets."""
    stats = [one.stats for one in choices if one.stats is not None]
    prompts = stats[:: request.n]
    prompt_tokens = sum(one.prompt_tokens for one in prompts)
    tokens = sum(one.tokens for one in stats)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in prompts)},
    }
    if "prediction" in request.options:
        usage["completion_tokens_details"] = prediction_details(stats)
    return usage


def whole_answer(heading: Heading, request: ApiRequest, choices: Sequence[Choice], codec: TextCodec) -> dict[str, Any]:
    """The object of an answer that is not streamed."""
    make = _chat_choice if request.chat else _completion_choice

    def choice(one: Choice) -> dict[str, Any]:
        made = make(heading, request, one, codec)
        if one.rounds is not None:
            objects = _round_objects(request, codec)
            made["rounds"] = [objects.of(step) for step in one.rounds]
        return made

    answer = heading.to_json("chat.completion" if request.chat else "text_completion")
    answer["choices"] = [choice(one) for one in choices]
    answer["usage"] = usage_of(choices, request)
    if request.chat and heading.prompt_ids:
        answer["prompt_token_ids"] = heading.prompt_ids[0]
    return answer


def _round_objects(request: ApiRequest, codec: TextCodec) -> RoundObjects:
    # Where it goes on from text, and under a grammar, a space that the answer begins with is its own.
    goes_on = not request.chat or bool(request.options.get("continue_final_message"))
    return RoundObjects(codec, continues=goes_on or "response_format" in request.options)


def _chat_choice(heading: Heading, request: ApiRequest, choice: Choice, codec: TextCodec) -> dict[str, Any]:  # noqa: ARG001 - as the other one
    text, reason = "".join(choice.text), choice.finish_reason
    if request.calls is None:
        message: dict[str, Any] = {"content": text}
    else:
        message, reason = message_of(text, request.calls, reason)
    return {
        "index": choice.index,
        "message": {"role": "assistant", **message, "refusal": None},
        "logprobs": None if request.logprobs is None else chat_logprobs(choice.logprobs, codec),
        "finish_reason": reason,
        **({"token_ids": choice.token_ids} if request.return_token_ids else {}),
    }


def _completion_choice(heading: Heading, request: ApiRequest, choice: Choice, codec: TextCodec) -> dict[str, Any]:
    before = request.echo[choice.index // request.n] if request.echo else ""
    value = {
        "index": choice.index,
        "text": before + "".join(choice.text),
        "logprobs": None if request.logprobs is None else CompletionLogprobs(codec).of(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }
    if request.return_token_ids:
        value["token_ids"] = choice.token_ids
        value["prompt_token_ids"] = heading.prompt_ids[choice.index // request.n]
    return value


class Chunks:
    """The objects of one streamed answer, in order: `first`, `of` each event, `last`."""

    def __init__(self, heading: Heading, request: ApiRequest, codec: TextCodec) -> None:
        self._heading, self._request, self._codec = heading, request, codec
        self._kind = "chat.completion.chunk" if request.chat else "text_completion"
        self._offsets = [CompletionLogprobs(codec) for _ in range(request.choices)]
        self._rounds = [_round_objects(request, codec) for _ in range(request.choices)]
        calls = request.calls
        self._deltas = [] if calls is None else [CallDeltas(calls) for _ in range(request.choices)]

    def first(self) -> list[dict[str, Any]]:
        """What is told before anything is generated: whose words they are, or the prompt."""
        request, ids = self._request, self._heading.prompt_ids
        if request.chat:
            chunks = [
                self._chunk(index, {"delta": {"role": "assistant", "content": ""}}) for index in range(request.choices)
            ]
            return [{**one, "prompt_token_ids": ids[0]} for one in chunks] if ids else chunks
        return [
            self._chunk(
                index,
                {
                    "text": request.echo[index // request.n] if request.echo else "",
                    **({"prompt_token_ids": ids[index // request.n]} if ids else {}),
                },
            )
            for index in range(request.choices)
            if request.echo or ids
        ]

    def of(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The chunks of an event; none for one that shows nothing: half a character, or the beginning of a stop."""
        if self._deltas:
            return self._with_calls(index, event)
        request = self._request
        tells = request.return_token_ids or request.return_rounds
        if not (event.text or event.finish_reason or event.logprobs or (tells and event.token_ids)):
            return []
        logprobs = None
        if request.logprobs is not None and event.logprobs:
            logprobs = (
                chat_logprobs(event.logprobs, self._codec) if request.chat else self._offsets[index].of(event.logprobs)
            )
        if not request.chat:
            value: dict[str, Any] = {"text": event.text}
        else:
            value = {"delta": {"content": event.text} if event.text or not event.finish_reason else {}}
        if request.return_token_ids:
            value["token_ids"] = event.token_ids
        if request.return_rounds:
            value["rounds"] = [self._rounds[index].of(event.round)]
        return [self._chunk(index, value, logprobs=logprobs, finish_reason=event.finish_reason)]

    def _with_calls(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The same for an answer that may call functions: a chunk for each delta, and one that says why it ended."""
        request, deltas = self._request, self._deltas[index]
        values: list[dict[str, Any]] = [
            {"delta": delta} for delta in deltas.of(event.text, ends=event.finish_reason is not None)
        ]
        reason = deltas.finish_reason(event.finish_reason)
        tells = request.return_token_ids or request.return_rounds
        if reason is not None or (tells and event.token_ids and not values):
            values.append({"delta": {}})
        if request.return_token_ids and values:
            # An event without values has no token either.
            values[0]["token_ids"] = event.token_ids
            values[1:] = [{**one, "token_ids": []} for one in values[1:]]
        if request.return_rounds and values:
            values[0]["rounds"] = [self._rounds[index].of(event.round)]
        chunks = [self._chunk(index, one) for one in values]
        if reason is not None:
            chunks[-1]["choices"][0]["finish_reason"] = reason
        return chunks

    def last(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """What is told after everything: the usage, where it was asked for."""
        if not self._request.include_usage:
            return []
        usage = usage_of(choices, self._request)
        return [{**self._heading.to_json(self._kind), "choices": [], "usage": usage}]

    def _chunk(
        self,
        index: int,
        value: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **value, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._heading.to_json(self._kind), "choices": [choice]}
        if self._request.include_usage:
            chunk["usage"] = None
        return chunk
