"""The commands that measure: bench, accuracy and simulate."""

from pathlib import Path
from typing import Annotated

import typer

from quasar.cli import check_output, emit_json, progress_steps
from quasar.errors import GenerationError
from runtime.cli_options import Backend, Directory, DrafterName, DraftTokens, Json, Kernels, Limit, Prompts, Threads


def bench(
    directory: Directory,
    prompts: Prompts,
    float_directory: Annotated[
        Path | None, typer.Option("--float", metavar="DIR2", help="An FP32 engine of the same model to compare with.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N")] = 128,
    limit: Limit = None,
    drafter: DrafterName = "auto",
    num_draft_tokens: DraftTokens = None,
    backend: Backend = None,
    kernels: Kernels = None,
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Time {float, quantized} × {plain, speculative}, and fixed prompt lookup, interleaved prompt by prompt."""
    import runtime
    from quasar.text import read_prompts

    check_output(json)
    from runtime.bench import bench as run_bench
    from runtime.bench import make_arms
    from runtime.cli_tables import print_bench

    rows = read_prompts(prompts, limit)
    # Two engines take turns here: one pool, so that the idle one costs the other nothing.
    runtime.share_threads(threads)
    quantized = runtime.load(directory, backend=backend, kernels=kernels, threads=threads)
    other = None
    if float_directory is not None:
        other = runtime.load(float_directory, backend=backend, kernels=kernels, threads=threads)
    arms = make_arms(quantized, other, drafter, num_draft_tokens)
    with progress_steps("runs", len(rows) * len(arms)) as step:
        result = run_bench(
            arms,
            rows,
            max_new_tokens=max_new_tokens,
            on_run=lambda: step(1),
        )
    print_bench(result)
    if json is not None:
        emit_json(result, json)


def accuracy(
    directory: Directory,
    prompts: Prompts,
    float_directory: Annotated[
        Path | None, typer.Option("--float", metavar="DIR2", help="An FP32 engine of the same model to compare with.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N")] = 256,
    limit: Limit = None,
    backend: Backend = None,
    kernels: Kernels = None,
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Score greedy answers against references: maths by exact match, summaries by ROUGE-L, with 95 % intervals.

    Rows count that have a `reference` and a category that begins with math or summar.
    """
    import runtime
    from quasar.text import read_prompts
    from runtime.accuracy import accuracy as run_accuracy
    from runtime.accuracy import num_scored

    check_output(json)
    rows = read_prompts(prompts, limit)
    runtime.share_threads(threads)
    paths = {"quantized": directory} if float_directory is None else {"float": float_directory, "quantized": directory}
    engines = {
        name: runtime.load(path, backend=backend, kernels=kernels, threads=threads) for name, path in paths.items()
    }
    with progress_steps("answers", num_scored(rows)) as step:
        result = run_accuracy(engines, rows, max_new_tokens=max_new_tokens, on_prompt=lambda: step(1))
    for metric, found in result.items():
        scores = {**found["engines"], **({"difference": found["difference"]} if "difference" in found else {})}
        for name, score in scores.items():
            interval = f"{score['low']:.3f} to {score['high']:.3f}"
            print(f"{metric}, {name}: {score['mean']:.3f} (95 %: {interval}), n {score['count']}")
    if json is not None:
        emit_json(result, json)


def simulate(
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="What --record wrote.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--engine",
            metavar="DIR",
            help="Its costs, whether trees are exact on it, and its likeliest successors.",
            show_default=False,
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            "--costs",
            metavar="FILE",
            help="Costs in place of the engine's, as JSON: rows in the cache → width → milliseconds.",
            show_default=False,
        ),
    ] = None,
    draft_costs: Annotated[
        Path | None,
        typer.Option(
            "--draft-costs",
            metavar="FILE",
            help="The same for engines that draft; needs --engine.",
            show_default=False,
        ),
    ] = None,
    drafter: DrafterName = "auto",
    num_draft_tokens: DraftTokens = None,
    half: Annotated[
        str,
        typer.Option(
            metavar="even|odd|all", help="even: the 1st, 3rd, … generation of each category; odd: the others."
        ),
    ] = "all",
    json: Json = None,
) -> None:
    """Replay recorded generations against a drafter: acceptance length and expected speed-up, without the verifier.

    Engines that draft do run, and their passes count as what they cost where they were measured (or --draft-costs).
    """
    from runtime.cli_tables import print_simulation
    from runtime.scenario import Scenario
    from runtime.simulation import halves
    from runtime.simulation import simulate as run_simulation
    from runtime.traces import read_trace

    check_output(json)
    if half not in ("even", "odd", "all"):
        raise GenerationError(f"--half is {half!r}; even, odd or all was expected")
    vocab_size, generations = read_trace(trace)
    if half != "all":
        generations = halves(generations)[half == "odd"]
    scenario = Scenario.read(directory, costs, vocab_size, draft_costs=draft_costs)
    with progress_steps("generations", len(generations)) as step:
        result = run_simulation(
            generations, scenario, drafter, num_draft_tokens=num_draft_tokens, on_generation=lambda: step(1)
        )
    print_simulation(result)
    if json is not None:
        emit_json(result, json)


def add_commands(app: typer.Typer) -> None:
    """Give the command group these commands."""
    for command in (bench, accuracy, simulate):
        app.command()(command)
