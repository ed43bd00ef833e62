"""How models write calls of functions: the formats that are known, and which one a chat template teaches.

A further format is an entry of `CALL_FORMATS`, if it writes a call as a JSON object.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """A way to write calls, each as a JSON object with the function's name and its arguments.

    Attributes:
        name: of the format, for `--tool-format`.
        opener: text that begins a call anywhere in an answer; "" if calls stand at the answer's beginning alone.
        tag: text that may stand before the first call, and means nothing.
        closer: text that ends a call; a model may forget it.
        several: whether an answer may hold several calls, where a grammar makes them.
        arguments: the key of the arguments, as the model was taught it, and others that are read.
        tokens: of an engine's vocabulary, those that are an opener or a closer as a whole: text → id.
    """

    name: str
    opener: str
    tag: str
    closer: str
    several: bool
    arguments: tuple[str, ...]
    tokens: Mapping[str, int] = field(default_factory=dict)


HERMES = CallFormat(
    name="hermes", opener="<tool_call>", tag="", closer="</tool_call>", several=True, arguments=("arguments",)
)
# Its templates refuse messages with more than one call. Several that come all the same have a semicolon between them.
LLAMA3_JSON = CallFormat(
    name="llama3-json",
    opener="",
    tag="<|python_tag|>",
    closer=";",
    several=False,
    arguments=("parameters", "arguments"),
)
CALL_FORMATS = {one.name: one for one in (HERMES, LLAMA3_JSON)}


def format_of(template: str) -> CallFormat | None:
    """The format in which a chat template writes calls; None for one that is not known here.

    Quotes may be escaped, as in Jinja's own strings.
    """
    source = template.replace("\\", "")
    if HERMES.opener in source:
        # The same markers stand around XML in other families.
        return HERMES if '"arguments"' in source and "<function=" not in source else None
    if '{"name": ' in source and '"parameters": ' in source and ("ipython" in source or LLAMA3_JSON.tag in source):
        return LLAMA3_JSON
    return None


def reads_tools(template: str) -> bool:
    """Whether a chat template shows the functions that it is given."""
    return re.search(r"\btools\b", template) is not None
