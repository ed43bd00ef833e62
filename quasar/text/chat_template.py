"""Chat templates: Jinja that comes with a checkpoint, and so is rendered in Jinja's sandbox."""

import datetime as dt
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from quasar.errors import PromptError
from quasar.text.messages import Message

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser


# What `strftime_now` says where nobody gives a date: a text must not depend on the day on which it is made.
DEFAULT_DATE = "2026-01-01"
_RESERVED = ("messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "strftime_now", "raise_exception")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How a conversation is rendered.

    template: the name of one of the checkpoint's templates; "" takes "tool_use" for tools where there is one, else the
        default.
    tools: descriptions of functions, as transformers and OpenAI have them.
    arguments: further arguments of the template, such as {"enable_thinking": False}.
    continue_final_message: the last message is an answer that was begun; the text goes on with it.
    date: what `strftime_now` says, as 2026-01-01; "" takes the engine's own.
    parse_special: special tokens in content are control tokens; else they are text.
    """

    template: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    date: str = ""
    parse_special: bool = False

    def check(self) -> None:
        """Raise `PromptError` for a date or an argument that no template can have."""
        for name in self.arguments:
            if name in _RESERVED:
                raise PromptError(f"the template argument {name!r} is set by the engine: leave it out")
        if self.date:
            _midnight(self.date)


class ChatTemplate:
    """A checkpoint's chat template with the special tokens that it may name, and its other templates by name."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        named: Mapping[str, str] | None = None,
        date: str = DEFAULT_DATE,
    ) -> None:
        self._sources = {**(named or {}), **({"default": source} if source else {})}
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._date = date
        self._compiled: dict[str, Template] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The templates that may be chosen."""
        return tuple(sorted(self._sources))

    @property
    def default_source(self) -> str:
        """The template that is taken where nobody chooses one."""
        return self._sources.get("default", "")

    @property
    def tool_source(self) -> str:
        """The template that is taken where functions are given and nobody chooses one."""
        return self._sources.get("tool_use", self.default_source)

    def render(self, messages: Sequence[Message], options: ChatOptions | None = None) -> str:
        """The conversation as text that ends where the assistant's answer starts, or goes on.

        Raises `PromptError` if the template is broken, refuses the conversation, does not read what it is given, or
        reaches out of the sandbox.
        """
        from jinja2.exceptions import SecurityError

        options = ChatOptions() if options is None else options
        options.check()
        name = self._choose(options)
        self._check_read(self._sources[name], messages, options)
        shown, mark = [dict(message) for message in messages], ""
        if options.continue_final_message:
            mark = secrets.token_hex(16)
            shown[-1]["content"] = f"{shown[-1].get('content') or ''}{mark}"
        moment = _midnight(options.date or self._date)
        try:
            text = self._template(name).render(
                messages=shown,
                tools=[dict(tool) for tool in options.tools] or None,
                add_generation_prompt=not options.continue_final_message,
                strftime_now=lambda form: moment.strftime(form),
                **self._tokens,
                **{"documents": None, **options.arguments},
            )
        except SecurityError as error:
            raise PromptError(f"the chat template reaches for Python internals and is refused ({error})") from None
        except PromptError:
            raise  # what the template itself says of the conversation
        # A template is a program of its own: whatever it raises, it cannot render.
        except Exception as error:
            raise PromptError(f"the chat template cannot render this conversation ({error})") from None
        if mark and mark not in text:
            raise PromptError("the chat template does not show the last message, so its answer cannot go on from it")
        return text.partition(mark)[0] if mark else text

    def _choose(self, options: ChatOptions) -> str:
        name = options.template or ("tool_use" if options.tools and "tool_use" in self._sources else "default")
        if name not in self._sources:
            raise PromptError(f"the engine has no chat template {name!r}; it has {', '.join(self.names)}")
        return name

    def _check_read(self, source: str, messages: Sequence[Message], options: ChatOptions) -> None:
        """What a template never names would vanish without a word."""
        if options.tools and not _names(source, "tools"):
            raise PromptError("tools were given, and this chat template does not read them: leave them out")
        for name in options.arguments:
            if not _names(source, name):
                raise PromptError(f"the chat template does not read the argument {name!r}: leave it out")
        if "tojson" in source:
            return  # it may show whole messages
        for message in messages:
            for key in message:
                if key not in ("role", "content") and not _names(source, key):
                    raise PromptError(f"a message has the key {key!r}, which this chat template does not read")

    def _template(self, name: str) -> "Template":
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._sources[name])
        return self._compiled[name]

    @cached_property
    def _environment(self) -> "Environment":
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
        return environment


def _names(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _midnight(date: str) -> dt.datetime:
    try:
        return dt.datetime.combine(dt.date.fromisoformat(date), dt.time())
    except ValueError:
        raise PromptError(f"the date is {date!r}; one like {DEFAULT_DATE} was expected") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise PromptError(f"the chat template refuses this conversation: {' '.join(str(message).split())}")
