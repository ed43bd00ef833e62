"""The commands that generate: generate and chat.

What a command runs is imported when it runs, so that its help answers at once.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from quasar.cli import command_of_lists, console, emit_json, new_app
from quasar.errors import GenerationError
from runtime.cli_options import (
    LISTS,
    Backend,
    Directory,
    Kernels,
    Record,
    Threads,
    generation_options,
    load_engine,
    read_tools,
)

_WithLists = command_of_lists(**LISTS)
app = new_app()


@app.command(cls=_WithLists)
@generation_options()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="One user message.")],
    options: Any,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Feed the prompt as it stands, for base models.")
    ] = False,
    answer: Annotated[
        str,
        typer.Option(metavar="TEXT", help="What the answer begins with; the text goes on from it.", show_default=False),
    ] = "",
    tools: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Functions for the chat template, a JSON list.", show_default=False),
    ] = None,
    backend: Backend = None,
    kernels: Kernels = None,
    threads: Threads = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Close with counts and speed, on stderr.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --json: log-probabilities of the text and the N likeliest.", show_default=False
        ),
    ] = None,
    record: Record = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming the text.")] = False,
) -> None:
    """Answer PROMPT, streaming the text."""
    import contextlib
    import dataclasses

    import runtime
    from runtime.cli_tables import describe, print_drafts

    if logprobs is not None and not json:
        raise GenerationError("--logprobs is printed with --json only: add it")
    engine = load_engine(directory, options["drafter"], backend=backend, kernels=kernels, threads=threads)
    with contextlib.nullcontext() if record is None else runtime.Recorder(record) as recorder:
        if no_chat_template:
            options["chat_template"] = False
        if tools is not None:
            options["tools"] = read_tools(tools)
        asked: Any = prompt
        if answer:
            asked = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            options["continue_final_message"] = True
        events = engine.stream(asked, **options, logprobs=logprobs, recorder=recorder)
        if json:
            from runtime.events import gather

            generation = gather(events)
            value = dataclasses.asdict(generation)
            value["stats"] = generation.stats.to_json()
            if logprobs is None:
                del value["logprobs"]
            emit_json({**value, "kernels": engine.kernels})
            last = generation.stats
        else:
            for event in events:
                print(event.text, end="", flush=True)
            print()
            assert event.stats is not None
            last = event.stats
    if stats:
        console().print(describe(last))
        print_drafts(last)
        if engine.kernels:
            console().print(f"kernels: {engine.kernels}", soft_wrap=True)


@app.command(cls=_WithLists)
@generation_options()
def chat(
    directory: Directory,
    options: Any,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the conversation begins with.", show_default=False)
    ] = None,
    backend: Backend = None,
    kernels: Kernels = None,
    threads: Threads = 0,
) -> None:
    """Talk to the model: lines in, answers out. Ctrl-C stops an answer."""
    import contextlib

    from runtime.chat import chat as run_chat
    from runtime.cli_tables import describe

    # Lines can be edited, and recalled with the arrow keys, where Python has readline.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    with load_engine(directory, options["drafter"], backend=backend, kernels=kernels, threads=threads) as engine:
        engine.warmup()
        run_chat(
            engine,
            options,
            system=system or "",
            read=input,
            write=lambda text: print(text, end="", flush=True),
            describe=describe,
        )
