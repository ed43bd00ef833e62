"""The commands that measure decoding: verify, bench, accuracy and simulate.

What a command runs is imported when it runs, so that its help answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evaluation.accuracy import MAX_NEW_TOKENS
from quasar.cli import check_output, command_of_lists, console, emit_json, new_app, progress_steps
from quasar.errors import GenerationError
from runtime.cli_options import (
    LISTS,
    Backend,
    Directory,
    DrafterName,
    DraftTokens,
    Kernels,
    Record,
    Threads,
    generation_options,
    load_engine,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluation.concurrency import TogetherExactness
    from evaluation.exactness import Exactness
    from quasar.text import Prompt
    from runtime.api import Engine

app = new_app()

Prompts = Annotated[Path, typer.Option("--prompts", metavar="FILE.jsonl", help="Rows with prompt, messages or turns.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="N prompts, one from each category in turn.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]


Concurrency = Annotated[
    int | None,
    typer.Option("--concurrency", min=1, metavar="N", help="N requests at a time, against each alone."),
]


@app.command(cls=command_of_lists(**LISTS))
@generation_options(max_new_tokens=64)
def verify(
    directory: Directory,
    prompts: Prompts,
    options: Any,
    turns: Annotated[
        str, typer.Option("--turns", metavar="first|all", help="all: later turns too, in a conversation.")
    ] = "first",
    limit: Limit = None,
    concurrency: Concurrency = None,
    cancel_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="With --concurrency: this share is cancelled half-way.")
    ] = 0.0,
    backend: Backend = None,
    kernels: Kernels = None,
    threads: Threads = 0,
    record: Record = None,
    json: Json = None,
) -> None:
    """Decode every prompt plainly and speculatively; exit code 1 if any token or length differs.

    With --temperature both draw with --seed (0 if none is given). With --turns all, plain answers start from an empty
    cache and speculative ones go on with the conversation's. With --concurrency, plain answers are made one by one and
    speculative ones many at a time, beginning, and with --cancel-share ending, at random. Exit code 1 as well if the
    drafter drafted nothing at all: then nothing was verified.
    """
    import contextlib

    import runtime
    from quasar.text import read_prompts

    check_output(json)
    from evaluation.exactness import verify as run_verify
    from evaluation.prompt_lengths import refuse_long

    if turns not in ("first", "all"):
        raise GenerationError(f"--turns is {turns!r}; first or all was expected")
    if options["deadline"] is not None:
        raise GenerationError("--deadline ends two runs at different places, so they cannot be compared: leave it out")
    if options["seed"] is None:
        options["seed"] = 0
    if concurrency is not None and (turns != "first" or record is not None):
        raise GenerationError("--concurrency takes single answers: leave --turns and --record out")
    rows = read_prompts(prompts, limit)
    engine = load_engine(directory, options["drafter"], backend=backend, kernels=kernels, threads=threads)
    refuse_long([engine], rows, options)
    if concurrency is not None:
        _verify_together(engine, rows, options, concurrency=concurrency, cancel_share=cancel_share, json=json)
        return
    with (
        contextlib.nullcontext() if record is None else runtime.Recorder(record) as recorder,
        progress_steps("plain and speculative", len(rows)) as step,
    ):
        found = run_verify(
            engine,
            rows,
            options,
            turns="all" if turns == "all" else "first",
            recorder=recorder,
            on_prompt=lambda: step(1),
        )
    reused = f", {found.reused_tokens} prompt tokens reused" if turns == "all" else ""
    print(
        f"identical: {found.identical} of {found.prompts} prompts, {found.answers} answers, {found.tokens} tokens, "
        f"{found.rounds} rounds, acceptance length {found.acceptance_length:.2f}{reused}"
    )
    for divergence in found.divergences:
        print(
            f"prompt {divergence.prompt}, turn {divergence.turn}, token {divergence.position}: "
            f"plain {divergence.plain_id}, speculative {divergence.speculative_id}, logit gap {divergence.logit_gap}"
        )
    _end_verify(found, drafts=options["drafter"] != "none", json=json)


def _end_verify(found: "Exactness | TogetherExactness", *, drafts: bool, json: Path | None) -> None:
    """Write the JSON; exit code 1 where an answer differs, or where drafts were to be verified and there were none."""
    if json is not None:
        emit_json(found.to_json(), json)
    if drafts and found.drafted == 0:
        console().print("nothing was drafted, so nothing was verified: give more or longer prompts")
        raise typer.Exit(1)
    if found.identical != found.prompts:
        raise typer.Exit(1)


def _verify_together(
    engine: "Engine",
    rows: "Sequence[Prompt]",
    options: Any,
    *,
    concurrency: int,
    cancel_share: float,
    json: Path | None,
) -> None:
    from evaluation.concurrency import verify_together

    with progress_steps("alone and together", 2 * len(rows)) as step:
        found = verify_together(
            engine,
            rows,
            options,
            concurrency=concurrency,
            cancel_share=cancel_share,
            seed=options["seed"],
            on_prompt=lambda: step(1),
        )
    print(
        f"identical: {found.identical} of {found.prompts} prompts, {found.cancelled} of them cancelled, {found.tokens} "
        f"tokens, {found.drafted} drafted, up to {found.widest} sequences a pass"
    )
    for prompt, position in found.differences:
        print(f"prompt {prompt}: token {position} differs from the answer alone")
    _end_verify(found, drafts=options["drafter"] != "none", json=json)


@app.command(cls=command_of_lists(concurrency=r"\d+"))
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
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            "--concurrency",
            min=1,
            metavar="N …",
            help="So many requests at a time, plain and with drafts, in place of the other comparison.",
            show_default=False,
        ),
    ] = None,
    backend: Backend = None,
    kernels: Kernels = None,
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Time {float, quantized} × {plain, speculative}, and fixed prompt lookup, interleaved prompt by prompt.

    With --concurrency: throughput, time to the first token and time between tokens of many requests at once.
    """
    import runtime
    from quasar.text import read_prompts

    check_output(json)
    if concurrency:
        if float_directory is not None:
            raise GenerationError("--concurrency measures one engine: leave --float out")
        _bench_together(
            runtime.load(directory, backend=backend, kernels=kernels, threads=threads, max_sequences=max(concurrency)),
            read_prompts(prompts, limit),
            concurrency,
            max_new_tokens=max_new_tokens,
            json=json,
        )
        return
    from evaluation.bench import bench as run_bench
    from evaluation.bench import make_arms
    from evaluation.prompt_lengths import refuse_long
    from evaluation.tables import print_bench

    rows = read_prompts(prompts, limit)
    # One thread pool for both engines: with a pool each, the idle one's threads would slow the other down.
    runtime.share_threads(threads)
    quantized = runtime.load(directory, backend=backend, kernels=kernels, threads=threads)
    other = None
    if float_directory is not None:
        other = runtime.load(float_directory, backend=backend, kernels=kernels, threads=threads)
    refuse_long([quantized] if other is None else [quantized, other], rows)
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


def _bench_together(
    engine: "Engine",
    rows: "Sequence[Prompt]",
    concurrency: "Sequence[int]",
    *,
    max_new_tokens: int,
    json: Path | None,
) -> None:
    from evaluation.concurrency import ARMS, ROUNDS, bench_together
    from evaluation.prompt_lengths import refuse_long
    from evaluation.tables import print_together

    refuse_long([engine], rows)
    with progress_steps("runs", ROUNDS * len(ARMS) * len(concurrency)) as step:
        result = bench_together(engine, rows, concurrency, max_new_tokens=max_new_tokens, on_run=lambda: step(1))
    print_together(result)
    if json is not None:
        emit_json(result, json)


@app.command()
def accuracy(
    directory: Directory,
    prompts: Prompts,
    float_directory: Annotated[
        Path | None, typer.Option("--float", metavar="DIR2", help="An FP32 engine of the same model to compare with.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N")] = MAX_NEW_TOKENS,
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
    from evaluation.accuracy import accuracy as run_accuracy
    from evaluation.accuracy import is_scored, num_scored
    from evaluation.prompt_lengths import refuse_long
    from quasar.text import read_prompts

    check_output(json)
    rows = read_prompts(prompts, limit)
    runtime.share_threads(threads)
    paths = {"quantized": directory} if float_directory is None else {"float": float_directory, "quantized": directory}
    engines = {
        name: runtime.load(path, backend=backend, kernels=kernels, threads=threads) for name, path in paths.items()
    }
    refuse_long(engines.values(), rows, is_asked=is_scored)
    with progress_steps("answers", num_scored(rows)) as step:
        result = run_accuracy(engines, rows, max_new_tokens=max_new_tokens, on_prompt=lambda: step(1))
    for metric, found in result.items():
        scores = {**found["engines"], **({"difference": found["difference"]} if "difference" in found else {})}
        for name, score in scores.items():
            interval = f"{score['low']:.3f} to {score['high']:.3f}"
            print(f"{metric}, {name}: {score['mean']:.3f} (95 %: {interval}), n {score['count']}")
    if json is not None:
        emit_json(result, json)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="What --record wrote.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--engine",
            metavar="DIR",
            help="Its latencies, whether trees are exact on it, and its likeliest successors.",
            show_default=False,
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            "--costs",
            metavar="FILE",
            help="Latencies in place of the engine's, as JSON: cached length → width → milliseconds.",
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
    head: Annotated[
        bool, typer.Option("--head", help="With the engine's draft head, for which the verifier runs; needs --engine.")
    ] = False,
    head_step_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", min=0.0, help="What a step of the head takes (default: as it is here).", show_default=False
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

    Engines that draft do run, and their passes count with the latencies that were recorded for them (or --draft-costs).
    """
    from evaluation.replay import halves
    from evaluation.replay import simulate as run_replay
    from evaluation.replay_conditions import ReplayConditions
    from evaluation.tables import print_replay
    from evaluation.traces import read_trace

    check_output(json)
    if half not in ("even", "odd", "all"):
        raise GenerationError(f"--half is {half!r}; even, odd or all was expected")
    vocab_size, generations = read_trace(trace)
    if half != "all":
        generations = halves(generations)[half == "odd"]
    conditions = ReplayConditions.read(
        directory, costs, vocab_size, draft_costs=draft_costs, with_head=head, head_step_ms=head_step_ms
    )
    with progress_steps("generations", len(generations)) as step:
        result = run_replay(
            generations, conditions, drafter, num_draft_tokens=num_draft_tokens, on_generation=lambda: step(1)
        )
    print_replay(result)
    if json is not None:
        emit_json(result, json)
