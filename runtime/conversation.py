"""A conversation that keeps its positions in the KV cache: a later turn prefills only what is new.

Positions are reused only where they have the bits of a fresh prefill (`KVCache.reusable`), so every answer is the one
that the whole conversation would get from an empty cache.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from quasar.errors import ContextLimitError, GenerationError
from quasar.text import Message
from quasar.text.messages import check_messages
from runtime.asynchronous import collect, in_thread
from runtime.chat_options import completes
from runtime.events import Event, Generation, gather
from runtime.generation_options import GenerationOptions, Signal
from runtime.kv_cache import KVCache
from runtime.option_fields import is_integer
from runtime.option_keywords import OptionsDict, cancel_of, make_options, takes_options
from runtime.prompt_ids import Prompt, encode_prompt
from runtime.refusals import CLOSED, GENERATING, OVERTAKEN
from runtime.request import Hooks, start_request
from runtime.resources import EngineResources
from runtime.sequence import check_prompt
from runtime.slots import ScheduledSequence


class Conversation:
    """One sequence that goes on; made by `Engine.session`. A context manager that frees its memory.

    Generations of one conversation come one after the other; those of several share passes as other requests do.
    """

    def __init__(
        self,
        resources: EngineResources,
        hooks: Hooks,
        messages: tuple[Message, ...] = (),
        cache: KVCache | None = None,
    ) -> None:
        self._resources, self._hooks = resources, hooks
        self._messages = check_messages(messages, "messages") if messages else ()
        self._scheduled: ScheduledSequence | None = resources.new_sequence(cache, outlives=True)
        # How many messages there were when the sequence had so many tokens: where `truncate` may cut.
        self._marks = [(len(self._messages), 0)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free its positions; a second call does nothing."""
        scheduled, self._scheduled = self._scheduled, None
        if scheduled is not None:
            self._resources.scheduler.release(scheduled)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far; empty where it was fed token ids or plain text."""
        return self._messages

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Tokens whose positions are cached: a copy, int64 [n]."""
        return self._open().cache.tokens.copy()

    @takes_options
    def stream(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Iterator[Event]:
        """Generate, an event per round; the options are those of `Engine.stream`.

        Args:
            prompt: a string is the user's next message; a list of messages, or token ids, is the whole conversation,
                of which the positions that are cached already are not computed again.
            options: see `GenerationOptions`.

        The answer becomes part of the conversation, even of a stream that is cancelled or closed half-way; one that
        gave no token leaves the messages as they were.

        Raises:
            ContextLimitError: the conversation does not fit the KV cache; it stays as it was.
            GenerationError: an option that cannot be honoured; the conversation generates already, or is closed.
        """
        scheduled = self._open()
        checked = make_options(options, self._resources.loaded.directory.manifest.sampling_defaults)
        if scheduled.generating:
            raise GenerationError(GENERATING)
        ids = encode_prompt(prompt, self._resources.codec, checked.chat, self._messages)
        events = start_request(
            self._resources, ids, checked, self._hooks, scheduled, completes=completes(prompt, checked.chat)
        )
        asked, before = self._asked(prompt, checked), self._messages
        return self._events(events, asked, before, continues=checked.continue_final_message)

    @takes_options
    def generate(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Generation:
        """Generate to the end."""
        return gather(self.stream(prompt, **options))

    @takes_options
    def astream(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> AsyncIterator[Event]:
        """`stream` for asyncio, as `Engine.astream` is."""

        def start(cancel: Signal) -> Iterator[Event]:
            return self.stream(prompt, **cast("OptionsDict", {**options, "cancel": cancel}))

        return in_thread(start, cancel_of(options))

    @takes_options
    async def agenerate(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Generation:
        """`generate` for asyncio."""
        return gather(await collect(self.astream(prompt, **options)))

    @takes_options
    def prefill(self, prompt: Prompt | None = None, **options: Unpack[OptionsDict]) -> int:
        """Compute the positions of a prompt without an answer, for forks to share; returns how many tokens it has.

        Args:
            prompt: None: the conversation's messages; a string would be the user's next one.
            options: those of `stream` that say how a conversation is rendered; the others change nothing here.

        Raises:
            GenerationError: there is nothing to prefill, or the conversation is generating or closed.
            ContextLimitError: it does not fit the KV cache.
        """
        asked = self._messages if prompt is None else prompt
        checked = make_options(options, self._resources.loaded.directory.manifest.sampling_defaults)
        ids = encode_prompt(asked, self._resources.codec, checked.chat, self._messages)
        verifier = self._resources.verifier
        check_prompt(ids, verifier.contract)
        scheduler = self._resources.scheduler
        with self._alone() as scheduled:
            cache = scheduled.cache
            cache.truncate(cache.reusable(ids, decoded_exact=self._resources.loaded.record.row_invariance.prefill))
            for chunk in verifier.contract.prompt_chunks(len(ids), cache.length):
                # A turn of its own for each chunk, so that nobody waits for a long prompt.
                with scheduler.alone(scheduled):
                    verifier.prefill(ids[: chunk.stop], first=chunk.start, slot=cache.slot)
                    cache.commit(ids[chunk], prefill=True)
        return len(ids)

    def fork(self) -> "Conversation":
        """A second conversation that goes on from here, with a copy of the cached positions."""
        with self._alone() as scheduled:
            other = Conversation(self._resources, self._hooks, self._messages, scheduled.cache.copy())
            other._marks = list(self._marks)
            with self._resources.scheduler.alone(scheduled):
                session, cache = self._resources.loaded.session, scheduled.cache
                other._open().swapped_out = session.read_rows(0, cache.length, slot=cache.slot)
        return other

    def truncate(self, length: int) -> None:
        """Forget everything from token `length` on: positions, and the turns that are not whole before it.

        The messages that the conversation began with stay.

        Raises:
            ContextLimitError: the conversation has fewer tokens.
            GenerationError: it is generating or closed.
        """
        if not is_integer(length):
            raise ContextLimitError(f"length is {length!r}; a whole number of tokens was expected")
        with self._alone() as scheduled:
            cache = scheduled.cache
            if not 0 <= length <= cache.length:
                raise ContextLimitError(f"the conversation holds {cache.length} tokens and cannot be cut to {length}")
            cache.truncate(length)
            self._marks = [mark for mark in self._marks if mark[1] <= length]
            self._messages = self._messages[: self._marks[-1][0] if self._marks else 0]

    def _asked(self, prompt: Any, options: GenerationOptions) -> tuple[Message, ...]:
        """The messages of a prompt; none for token ids and plain text."""
        if isinstance(prompt, str):
            return (*self._messages, {"role": "user", "content": prompt}) if options.chat else ()
        if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], dict):
            return check_messages(prompt, "prompt")
        return ()

    def _events(
        self, events: Iterator[Event], asked: tuple[Message, ...], before: tuple[Message, ...], *, continues: bool
    ) -> Iterator[Event]:
        scheduled = self._open()
        if self._messages is not before:
            # It was rendered before another answer of the conversation was read, which it would drop.
            raise GenerationError(OVERTAKEN)
        texts: list[str] = []
        started = False
        try:
            for event in events:
                if event.token_ids and not started:
                    started = True
                    # Marks of a sequence that this prompt does not go on from are void.
                    self._marks = [mark for mark in self._marks if asked[: mark[0]] == self._messages[: mark[0]]]
                texts.append(event.text)
                yield event
        finally:
            closing = getattr(events, "close", None)
            if closing is not None:
                closing()
            if started:
                answer = "".join(texts)
                if asked and continues:
                    begun = asked[-1]
                    self._messages = (*asked[:-1], {**begun, "content": f"{begun.get('content') or ''}{answer}"})
                else:
                    self._messages = (*asked, {"role": "assistant", "content": answer}) if asked else ()
                self._marks.append((len(self._messages), scheduled.cache.length))

    @contextmanager
    def _alone(self) -> Iterator[ScheduledSequence]:
        """The sequence, with no generation of it under way or begun meanwhile."""
        scheduled = self._open()
        self._resources.scheduler.begin(scheduled)
        try:
            yield scheduled
        finally:
            self._resources.scheduler.end(scheduled)

    def _open(self) -> ScheduledSequence:
        if self._scheduled is None:
            raise GenerationError(CLOSED)
        return self._scheduled
