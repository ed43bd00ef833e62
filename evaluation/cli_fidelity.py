"""The commands that measure fidelity: report and sweep.

What a command runs is imported when it runs, so that its help answers at once.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from quasar.cli import check_output, command_of_lists, console, emit_json, new_app, progress_steps

app = new_app()


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="Prompts: rows with prompt, messages or turns (the first).")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="N prompts, one from each category in turn.")
    ] = None,
    float_model: Annotated[
        str | None,
        typer.Option("--float", metavar="MODEL", help="The float model (default: the recorded source checkpoint)."),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(help="On ONNX Runtime: native or stock (default: native if possible).", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page (default: DIR's name-report.html, here).", show_default=False),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")] = None,
) -> None:
    """KL, top-1 agreement and perplexity of an engine against its float model, and a page with the details.

    Teacher-forced on the prompts' own tokens (chat template applied, at most 512 each) and on the float model's own
    64-token continuations: the positions that a verifier decides.
    """
    from evaluation.page import html_page
    from evaluation.plots import new_figure
    from evaluation.report import report as make_report
    from quasar.files import atomic_path
    from quasar.text import read_prompts

    page = Path(f"{directory.resolve().name}-report.html") if html is None else html
    for path in (json, page):
        check_output(path)
    # Half a minute of work for nothing, if the page could not be drawn.
    new_figure(1, 1)
    figures = make_report(
        directory, read_prompts(prompts, limit), float_model=float_model, steps=progress_steps, kernels=kernels
    )
    _print(figures)
    with atomic_path(page) as temporary:
        temporary.write_text(html_page(figures), encoding="utf-8")
    typer.echo(f"page: {page}")
    if json is not None:
        emit_json(figures, json)


@app.command(cls=command_of_lists(recipe=r"[a-z][a-z0-9.,=-]*"))
def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for python -m export build.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where engines and results go.")],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="Prompts: rows with prompt, messages or turns (the first).")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="N prompts, one from each category in turn.")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE …",
            help="PRECISION[,alpha=…][,head=float][,kl=…] (default: a choice of eight).",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every combination that the model can have.")] = False,
    tasks: Annotated[
        bool,
        typer.Option("--tasks", help="Score tasks as well (accuracy), on all of FILE's rows with references."),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Calibration prompts, as for the build.", show_default=False),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")] = None,
) -> None:
    """Fidelity against latency over a set of recipes, as a table and a plot.

    Builds an engine for each recipe below DIR (those that are there are used), then measures all of them on the same
    prompts and in one interleaved run.
    """
    from evaluation.reused_engines import num_calibrated_on
    from evaluation.sweep import (
        ALL_RECIPES,
        DEFAULT_RECIPES,
        build_engines,
        markdown_table,
        possible_recipes,
        score_tasks,
        write_sweep,
    )
    from evaluation.sweep import sweep as run_sweep
    from quasar.text import read_prompts

    check_output(json)
    rows = read_prompts(prompts, limit)
    recipes = recipe or DEFAULT_RECIPES
    if everything and not recipe:
        recipes, refused = possible_recipes(model, ALL_RECIPES)
        for name, reason in refused.items():
            console().print(f"left out: {name}: {reason}")
    directories = build_engines(model, output, recipes, calibration)
    scored = score_tasks(directories, prompts, progress_steps) if tasks else None
    swept = run_sweep(model, directories, rows, progress_steps, scored)
    write_sweep(swept, output)
    typer.echo(markdown_table(swept), nl=False)
    _warn_of_overlap(num_calibrated_on(directories, rows))
    if json is not None:
        emit_json({"engines": [engine.to_json() for engine in swept]}, json)


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "KL (nats)", "top-1", "perplexity", "float", "tokens"):
        table.add_column(column, justify="left" if not column else "right")
    for name, part in (("prompts", figures), ("continuations", figures["continuation"])):
        table.add_row(
            name,
            f"{part['mean_kl_nats']:.4f}",
            f"{100 * part['top1_agreement']:.2f} %",
            f"{part['perplexity']:.3f}",
            f"{part['perplexity_float']:.3f}",
            str(part["tokens"]),
        )
    out.print(table)
    worst = sorted(
        (name for name, linear in figures["linears"].items() if linear["sqnr_db"] is not None),
        key=lambda name: figures["linears"][name]["sqnr_db"],
    )[:5]
    if worst:
        out.print("linears with the lowest SQNR (of their output, on calibration text):")
        for name in worst:
            linear = figures["linears"][name]
            out.print(
                f"  {name}: {linear['sqnr_db']:.1f} dB, amax {linear['amax_before']:.1f} → {linear['amax_after']:.1f}"
            )
    _warn_of_overlap(figures["calibration_overlap"])


def _warn_of_overlap(num_prompts: int) -> None:
    if num_prompts:
        console().print(f"warning: {num_prompts} of these prompts were calibrated on; the figures flatter")
