"""Prompts that an engine cannot hold are refused before the first answer: figures until then would be lost."""

from collections.abc import Callable, Iterable, Sequence

from quasar.errors import ContextLimitError
from quasar.text import Prompt
from runtime.api import Engine
from runtime.option_keywords import OptionsDict


def refuse_long(
    engines: Iterable[Engine],
    prompts: Sequence[Prompt],
    options: OptionsDict | None = None,
    *,
    is_asked: Callable[[Prompt], bool] = lambda _: True,
) -> None:
    """Raise `ContextLimitError` naming the first prompt, counted from 1, that one of the engines does not hold.

    The answers of a conversation are not known yet: of turns, the first one counts. `options`: those of the answers.
    `is_asked`: which of the prompts are.
    """
    given: OptionsDict = {} if options is None else options
    for engine in engines:
        longest = engine.manifest.contract.max_length
        for number, prompt in enumerate(prompts, start=1):
            if not is_asked(prompt):
                continue
            num_tokens = len(engine.encode(prompt.messages, **given))
            if num_tokens >= longest:
                raise ContextLimitError(
                    f"prompt {number} ({prompt.text[:60]!r}…) has {num_tokens} tokens and the engine holds {longest}, "
                    "new tokens included: take it out, or build with a larger --max-length"
                )
