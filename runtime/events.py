"""What a generation yields, and what it comes to."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from quasar.errors import QueueFullError
from runtime.loop import Round
from runtime.sampling.logprobs import TokenLogprob
from runtime.stats import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What one step of a generation emitted. The last event has a `finish_reason` and the `stats`.

    `text` may be empty while a character is incomplete or may be the start of a stop string; the events' texts joined
    are the generation's text. `logprobs`: of `token_ids`, where they were asked for. `round`: the step itself, with
    its draft and its seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    drafted: int
    accepted: int
    round: Round
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stopped_by: int | str | None = None
    stats: Stats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished generation.

    `finish_reason`: "stop" (`stopped_by`: an end or stop id, which is the last of `token_ids`, or a stop string,
    before which `text` is cut), "length", "cancelled" or "deadline". `stats.seed` repeats a drawn answer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: Stats
    stopped_by: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


def gather(events: Iterable[Event]) -> Generation:
    """A generation from all of its events."""
    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    # An interrupt between two events must not leave the stream open.
    with contextlib.closing(events) if isinstance(events, Generator) else contextlib.nullcontext():
        for event in events:
            texts.append(event.text)
            token_ids += event.token_ids
            logprobs += event.logprobs
    # A stream that ends without an error ends with the event that has both.
    assert event.finish_reason is not None
    assert event.stats is not None
    return Generation(
        text="".join(texts),
        token_ids=tuple(token_ids),
        finish_reason=event.finish_reason,
        stopped_by=event.stopped_by,
        stats=event.stats,
        logprobs=tuple(logprobs),
    )


def gather_all(starts: Sequence[Callable[[], Iterator[Event]]], *, together: bool = True) -> list[Generation]:
    """Generations of streams that go on together, in their order.

    All are made before one begins. Where the queue has no room for all of them, the others begin as these end.

    Args:
        together: False: each begins when the one before has ended, where all of them would take their slots in turn.
    """
    found: dict[int, Generation] = {}
    begun: deque[tuple[int, Iterator[Event]]] = deque()

    def finish_one() -> None:
        place, stream = begun.popleft()
        found[place] = gather(stream)

    with contextlib.ExitStack() as stack:

        def make(start: Callable[[], Iterator[Event]]) -> Iterator[Event]:
            stream = start()
            if isinstance(stream, Generator):
                stack.enter_context(contextlib.closing(stream))
            return stream

        for place, stream in enumerate([make(start) for start in starts]):
            while begun and not together:
                finish_one()
            while True:
                try:
                    begun.append((place, itertools.chain([next(stream)], stream)))
                    break
                except QueueFullError:
                    if not begun:
                        raise
                    finish_one()
                    stream = make(starts[place])
        while begun:
            finish_one()
    return [found[place] for place in range(len(starts))]
