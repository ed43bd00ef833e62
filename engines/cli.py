"""`python -m engines`: compare the back ends of an engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasar.cli import check_output, console, emit_json, new_app

if TYPE_CHECKING:
    from engines.compare import Comparison

app = new_app("Compare the back ends of an engine directory.")

_TEXT = "Speculative decoding drafts a few tokens, and the target model verifies them in one pass. Why is that faster?"


@app.callback()
def _group() -> None:
    """A group of one command is still a group: `python -m engines compare`."""


@app.command()
def compare(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory with a TensorRT back end.")],
    prompt: Annotated[str, typer.Option(help="The text, one user message.")] = _TEXT,
    worst: Annotated[int, typer.Option(min=1, metavar="N", help="Show the N worst tensors.")] = 10,
    threads: Annotated[int, typer.Option(help="0 takes one per physical core.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Feed one text to every back end and compare keys, values and logits layer by layer, worst first.

    ONNX Runtime is the reference. Without a GPU, the graph that TensorRT was given runs on the CPU in its place.
    """
    check_output(json)
    from engines.compare import compare_backends
    from engines.directory import open_directory
    from engines.text import open_codec

    opened = open_directory(directory)
    ids = open_codec(opened.path, opened.manifest.text).encode_chat([{"role": "user", "content": prompt}])
    comparisons = compare_backends(
        opened, ids[: opened.manifest.contract.max_length - 1], threads=threads, on_backend=console().print
    )
    for comparison in comparisons:
        _print(comparison, worst)
    if json is not None:
        emit_json([comparison.to_json() for comparison in comparisons], json)


def _print(comparison: "Comparison", worst: int) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    out.print(
        f"[bold]{comparison.backend}[/bold] on {comparison.ran_on}, against onnxruntime: {comparison.same_next_tokens} "
        f"of {comparison.tokens} next tokens are the same",
        soft_wrap=True,
    )
    table = Table("tensor", box=None, padding=(0, 2, 0, 0))
    for column in ("largest difference", "mean difference", "mean / spread"):
        table.add_column(column, justify="right")
    for one in comparison.differences[:worst]:
        table.add_row(one.tensor, f"{one.max_abs:.4g}", f"{one.mean_abs:.4g}", f"{100 * one.relative:.2f} %")
    out.print(table)
