"""`python -m runtime chat`: a conversation in a terminal. Ctrl-C stops the answer, not the program."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import cast

from quasar.errors import QuasarError
from quasar.text import Message
from runtime.api import Engine
from runtime.conversation import Conversation
from runtime.option_keywords import OptionsDict
from runtime.stats import Stats

HELP = "/reset forgets the conversation, /stats shows the last answer's counts, /exit (or Ctrl-D) leaves"


def chat(
    engine: Engine,
    options: OptionsDict,
    *,
    system: str,
    read: Callable[[str], str],
    write: Callable[[str], None],
    describe: Callable[[Stats], str],
) -> None:
    """Read, answer, and so on, until `read` raises EOFError or the user leaves.

    Args:
        read: given a prompt to show, returns a line; raises EOFError at the end, KeyboardInterrupt at Ctrl-C.
        write: takes pieces of text as they come.
        describe: the statistics in a line.
    """
    beginning = (Message(role="system", content=system),) if system else ()
    conversation, last = engine.session(beginning), None
    write(f"{HELP}\n")
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, RuntimeError):
            # RuntimeError: Python's `input` where standard input or output is closed.
            write("\n")
            return
        except KeyboardInterrupt:
            # A line that was begun and given up; twice on an empty one is how people leave, so say how.
            write(f"\n{HELP}\n")
            continue
        if not line:
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            conversation.close()
            conversation, last = engine.session(beginning), None
        elif line == "/stats":
            write(f"{describe(last) if last else 'nothing was generated yet'}\n")
        elif line.startswith("/"):
            write(f"{HELP}\n")
        else:
            last = _answer(conversation, line, options, write) or last


def _answer(conversation: Conversation, line: str, options: OptionsDict, write: Callable[[str], None]) -> Stats | None:
    with interrupts_set() as cancel:
        try:
            for event in conversation.stream(line, **cast("OptionsDict", {**options, "cancel": cancel})):
                write(event.text)
        except QuasarError as error:
            write(f"error: {error}\n")
            return None
    if event.finish_reason == "cancelled":
        write(" [stopped]")
    write("\n")
    return event.stats


@contextmanager
def interrupts_set() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in place of an exception; elsewhere than in the main thread Ctrl-C stays as it is."""
    cancel = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - Python's signature
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
