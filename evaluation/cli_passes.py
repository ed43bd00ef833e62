"""The commands that measure passes: compare back ends, and time kernels.

What a command runs is imported when it runs, so that its help answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasar.cli import check_output, command_of_lists, console, emit_json, new_app, progress_steps

if TYPE_CHECKING:
    from evaluation.compare import BackendComparison
    from evaluation.pass_latency import PassLatency

app = new_app()

_TEXT = "Speculative decoding drafts a few tokens, and the target model verifies them in one pass. Why is that faster?"


@app.command()
def compare(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory with a TensorRT back end.")],
    prompt: Annotated[str, typer.Option(help="One user message.")] = _TEXT,
    worst: Annotated[int, typer.Option(min=1, metavar="N", help="Show the N worst tensors.")] = 10,
    threads: Annotated[int, typer.Option(help="0 takes one per physical core.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Feed one text to ONNX Runtime and TensorRT and compare keys, values and logits by layer, worst first.

    ONNX Runtime is the reference. Without a GPU, the graph that TensorRT was given runs on the CPU in its place.
    """
    check_output(json)
    from engines.directory import open_directory
    from engines.text import open_codec
    from evaluation.compare import compare_backends

    opened = open_directory(directory)
    ids = open_codec(opened.path, opened.manifest.text).encode_chat([{"role": "user", "content": prompt}])
    comparisons = compare_backends(
        opened, ids[: opened.manifest.contract.max_length - 1], threads=threads, on_backend=console().print
    )
    for comparison in comparisons:
        _print(comparison, worst)
    if json is not None:
        emit_json([comparison.to_json() for comparison in comparisons], json)


@app.command(cls=command_of_lists(kernels="stock|native", widths=r"\d+", rows=r"\d+"))
def time(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")],
    kernels: Annotated[
        list[str] | None,
        typer.Option(
            help="stock or native; several are interleaved (default: both where both run).", show_default=False
        ),
    ] = None,
    widths: Annotated[
        list[int] | None, typer.Option(metavar="T", help="Positions of a pass.", show_default="1 2 4 8 16")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Cached positions.", show_default="256 1900")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each kind.")] = 15,
    threads: Annotated[int, typer.Option(help="0 takes one per physical core.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Time whole verify passes, kernels alternating: medians, beside what memory bandwidth allows."""
    check_output(json)
    from engines.directory import open_directory
    from engines.onnxruntime.files import onnxruntime_files
    from engines.onnxruntime.kernels import NATIVE, STOCK, choose_kernels
    from evaluation.pass_latency import measure_pass_latency

    opened = open_directory(directory)
    if not kernels:
        files = onnxruntime_files(opened.manifest)
        native = choose_kernels(None, files)
        kernels = ([] if files.native_alone else [STOCK]) + ([] if native.library is None else [NATIVE])
        if native.reason:
            console().print(f"stock kernels alone: {native.reason}", soft_wrap=True)
    longest = opened.manifest.contract.max_length
    counts = rows or [count for count in (256, 1900) if count <= longest] or [longest]
    chosen = widths or [width for width in (1, 2, 4, 8, 16) if width <= opened.manifest.contract.max_width]
    with progress_steps("passes", len(counts)) as step:
        latency = measure_pass_latency(
            opened,
            kernels,
            widths=chosen,
            cached_lengths=counts,
            threads=threads,
            repeats=repeats,
            on_cached_length=lambda: step(1),
        )
    _print_latency(latency)
    if json is not None:
        emit_json(latency.to_json(), json)


def _print_latency(latency: "PassLatency") -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    table = Table(title="milliseconds of a verify pass", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("cached positions", justify="right")
    table.add_column("kernels")
    surfaces = list(latency.ms.values())
    widths = list(next(iter(surfaces[0].values())))
    for width in widths:
        table.add_column(f"t({width})", justify="right")
    for length in surfaces[0]:
        for name, surface in latency.ms.items():
            table.add_row(str(length), latency.kernels[name], *(f"{surface[length][width]:.2f}" for width in widths))
        if len(surfaces) == 2:
            first, second = surfaces
            ratios = (f"{first[length][width] / second[length][width]:.2f}" for width in widths)
            table.add_row("", " / ".join(latency.ms), *ratios, style="bold")
        if latency.floor_ms is not None:
            table.add_row("", "reading it once", f"{latency.floor_ms[length]:.2f}", style="dim")
    out.print(table)
    out.print(f"memory: {latency.bandwidth_gb_s:.1f} GB/s")


def _print(comparison: "BackendComparison", worst: int) -> None:
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
