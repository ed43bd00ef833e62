"""Chat templates: Jinja that comes with a checkpoint, and so is rendered in Jinja's sandbox."""

import datetime as dt
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from quasar.errors import PromptError

if TYPE_CHECKING:
    from jinja2 import Template


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
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **self._tokens
            )
        except SecurityError as error:
            raise PromptError(f"the chat template reaches for Python internals and is refused ({error})") from None
        except (TemplateError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise PromptError(f"the chat template cannot render this conversation ({error})") from None

    @cached_property
    def _template(self) -> "Template":
        from jinja2.exceptions import SecurityError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Sandbox(ImmutableSandboxedEnvironment):
            # Jinja would print nothing for an unsafe attribute and complain only when it is used.
            def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
                raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is unsafe")

        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        # The three helpers that transformers gives to templates.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)
        return environment.from_string(self._source)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
