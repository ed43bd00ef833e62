"""The command that predicts passes on GPUs: roofline.

What a command runs is imported when it runs, so that its help answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasar.cli import check_output, command_of_lists, emit_json, new_app
from quasar.errors import QuasarError

if TYPE_CHECKING:
    from rich.table import Table

    from evaluation.roofline import PassLimit, PassPrediction, Roofline

app = new_app()


@app.command(cls=command_of_lists(widths=r"\d+", cached=r"\d+"))
def roofline(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="An engine directory.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="In place of DIR, a model without an engine: qwen3-8b, llama-3-8b, smollm2 or qwen3-1.7b, in W8A8.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="a10, a100, l40s, rtx-4090, h100 or h200 (default: all).", show_default=False
        ),
    ] = None,
    widths: Annotated[
        list[int] | None, typer.Option(metavar="T", help="Positions of a pass.", show_default="1 2 4 8 16 32")
    ] = None,
    cached: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Cached positions.", show_default="256 2048 8192")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help='Passes to put beside the model: {"gpu": "h100", "t_ms": {"CACHED": {"WIDTH": MS}}}.',
            show_default=False,
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Predict verify passes on GPUs from memory bandwidth and tensor rates: a model of limits, not a measurement.

    A pass takes the larger of bytes / bandwidth and operations / rate. The same model in BF16 stands beside it.
    Sliding windows are left out: every layer reads all cached positions.
    """
    check_output(json)
    from engines.directory import open_directory
    from evaluation.roofline import GPUS, engine_model, gpu_limits, read_measured, shape_model
    from evaluation.roofline import roofline as predict

    if gpu is not None:
        gpu_limits(gpu)
    if directory is not None and shape is not None:
        raise QuasarError("an engine directory and --shape were given; one of them was expected")
    points = None if measured is None else read_measured(measured)
    if shape is not None:
        model = shape_model(shape)
    elif directory is not None:
        model = engine_model(open_directory(directory))
    else:
        raise QuasarError("neither an engine directory nor --shape was given; one of them was expected")
    predicted = predict(
        model, tuple(GPUS) if gpu is None else (gpu,), widths=widths, cached_lengths=cached, measured=points
    )
    _print(predicted)
    if json is not None:
        emit_json(predicted.to_json(), json)


def _print(predicted: "Roofline") -> None:
    from rich.console import Console

    from evaluation.roofline import NOTE

    out = Console(highlight=False)
    model, bf16 = predicted.model, predicted.model.in_bf16()
    out.print(f"[bold]milliseconds of a verify pass: {NOTE}[/bold]", soft_wrap=True)
    out.print(
        f"{model.name}, {model.precision}: {model.weight_bytes / 1e9:.3f} GB of linears a pass "
        f"({bf16.weight_bytes / 1e9:.3f} GB in BF16), {model.position_bytes / 1e3:.1f} kB a cached position",
        soft_wrap=True,
    )
    too_large = predicted.too_large_for()
    for name, gpu in predicted.gpus.items():
        out.print()
        out.print(
            f"[bold]{gpu.title}[/bold] ({name}, compute capability {gpu.compute_capability}): "
            f"{gpu.bandwidth_gb_s:g} GB/s, {gpu.int8_tops:g} INT8 TOPS, {gpu.float16_tflops:g} BF16 TFLOPS, "
            f"{gpu.memory_gb:g} GB{', too small for this' if name in too_large else ''}",
            soft_wrap=True,
        )
        out.print(_table([one for one in predicted.passes if one.gpu == name], model.precision))
    out.print()
    starred = any("compute" in (one.limit.bound, one.bf16.bound) for one in predicted.passes)
    out.print("* bound by the tensor cores; the others by memory" if starred else "all of them are bound by memory")


def _table(passes: "list[PassPrediction]", precision: str) -> "Table":
    """One GPU's passes: a line for each figure at each cached length, a column for each width."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("cached", justify="right")
    table.add_column("", no_wrap=True)
    for width in sorted({one.width for one in passes}):
        table.add_column(f"t({width})", justify="right", no_wrap=True)
    for length in sorted({one.cached_length for one in passes}):
        here = [one for one in passes if one.cached_length == length]
        table.add_row(str(length), precision, *(_ms(one.limit) for one in here))
        table.add_row("", "bf16", *(_ms(one.bf16) for one in here))
        table.add_row("", f"bf16 / {precision}", *(f"{one.ratio:.2f} " for one in here), style="bold")
        if any(one.measured_ms is not None for one in here):
            times = ("" if one.measured_ms is None else f"{one.measured_ms:.3f} " for one in here)
            shares = ("" if one.share is None else f"{100 * one.share:.0f} % " for one in here)
            table.add_row("", "measured", *times)
            table.add_row("", "share reached", *shares)
    return table


def _ms(limit: "PassLimit") -> str:
    """Milliseconds; a star, or a space in its place, says what bounds them."""
    return f"{limit.ms:.3f}{'*' if limit.bound == 'compute' else ' '}"
