"""The command that trains a draft head.

What it runs is imported when it runs, so that its help answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from quasar.cli import console, emit_json, new_app

app = new_app()


@app.command("train-head")
def train_draft_head(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The engine directory to train a draft head for.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="HEAD", help="The folder to write.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Prompts whose answers the head learns from (default: the model writes them itself).",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(metavar="N", help="For generating text and training on it, together.")] = 60,
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens that the head can draft (default: as many as 98.5 % of the verifier's probability takes, "
            "4096 to 32000).",
            show_default=False,
        ),
    ] = None,
    intermediate_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of the head's MLP (default: the model's, but at most 4 times its hidden size).",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Where the float model is, if it is not where the engine was built from.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Prompts that the head must not learn from, beside the project's evaluation prompts.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the generated text there, and go on with what is there (default: deleted when done).",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Generate so many tokens, however long it takes.", show_default=False),
    ] = None,
    updates: Annotated[
        int | None,
        typer.Option(metavar="N", help="Train for so many updates, however long it takes.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the text, and of the training.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout when done.")] = False,
) -> None:
    """Train an EAGLE draft head for DIR on text of its own verifier.

    An interrupted training goes on where it was when the same command is run again.
    """
    from calibration.draft_heads.head_options import TrainHeadOptions
    from calibration.draft_heads.partial_head import read_report
    from calibration.draft_heads.train_head import train_head

    options = TrainHeadOptions(
        directory=directory,
        output=output,
        prompts=prompts,
        excluded=exclude,
        minutes=minutes,
        draft_vocab=draft_vocab,
        intermediate_size=intermediate_size,
        model=model,
        data=data,
        tokens=tokens,
        updates=updates,
        seed=seed,
    )
    path = train_head(options, _Console())
    if json:
        emit_json(read_report(path))


class _Console:
    """Stage lines on stderr."""

    def __init__(self) -> None:
        self._console = console()

    def stage(self, title: str, detail: str = "") -> None:
        """A stage begins, or has come so far."""
        self._console.print(f"[bold]{title:<11}[/bold] {detail}")
