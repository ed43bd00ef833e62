"""How a prompt becomes text: the options of a generation that the chat template is rendered with."""

from collections.abc import Mapping, Sequence
from typing import Any

from quasar.errors import GenerationError
from quasar.text import ChatOptions


def chat_options(
    *,
    chat_template: bool | str,
    tools: Sequence[Mapping[str, Any]] | None,
    arguments: Mapping[str, Any] | None,
    continue_final_message: bool,
    date: str | None,
    parse_special: bool,
) -> ChatOptions | None:
    """The options, checked; None: no chat template.

    Raises `GenerationError` naming the option that cannot be honoured, `PromptError` for a date that is none.
    """
    if not isinstance(chat_template, (bool, str)) or chat_template == "":
        raise GenerationError(f"chat_template is {chat_template!r}; True, False or a name was expected")
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(one, Mapping) for one in tools)):
        raise GenerationError(f"tools is {tools!r}; a list of objects was expected")
    if arguments is not None and not (
        isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)
    ):
        raise GenerationError(f"chat_template_kwargs is {arguments!r}; names with values were expected")
    if date is not None and not isinstance(date, str):
        raise GenerationError(f"date is {date!r}; a date like 2026-01-01 was expected")
    chat = ChatOptions(
        template=chat_template if isinstance(chat_template, str) else "",
        tools=tuple(tools or ()),
        arguments=dict(arguments or {}),
        continue_final_message=continue_final_message,
        date=date or "",
        parse_special=parse_special,
    )
    chat.check()
    if chat_template is not False:
        return chat
    for name, value in (
        ("tools", tools),
        ("chat_template_kwargs", arguments),
        ("continue_final_message", continue_final_message),
        ("date", date),
    ):
        if value:
            raise GenerationError(f"{name} has a meaning with a chat template alone: leave it out")
    return None


def completes(prompt: object, chat: ChatOptions | None) -> bool:
    """Whether the tokens go on from the prompt's own text, so that a leading space is theirs."""
    if chat is None or chat.continue_final_message:
        return True
    if isinstance(prompt, str):
        return False
    return not (isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping))
