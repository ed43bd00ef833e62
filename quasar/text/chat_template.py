"""Chat templates: Jinja that comes with a checkpoint, and so is rendered in Jinja's sandbox."""

import datetime as dt
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from quasar.errors import PromptError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A checkpoint's chat template with the special tokens that it may name."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text that ends where the assistant's answer starts.

        Raises `PromptError` if the template is broken, refuses the conversation, or reaches out of the sandbox.
        """
        from jinja2.exceptions import SecurityError

        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except SecurityError as error:
            raise PromptError(f"the chat template reaches for Python internals and is refused ({error})") from None
        # A template is a program of its own: whatever it raises, it cannot render.
        except Exception as error:
            raise PromptError(f"the chat template cannot render this conversation ({error})") from None

    @cached_property
    def _template(self) -> "Template":
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            # Marks the assistant's words for training; nothing to do here.
            tags = {"generation"}  # noqa: RUF012 - as the base class declares it

            def parse(self, parser: "Parser") -> "list[Node]":
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        class Sandbox(ImmutableSandboxedEnvironment):
            # Jinja would print nothing for an unsafe attribute and complain only when it is used.
            def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
                raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is unsafe")

        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
        # The three helpers that transformers gives to templates.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)
        return environment.from_string(self._source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
