"""`python -m runtime`: generate, prove that speculation is exact, measure speed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar.cli import check_output, command_of_lists, console, emit_json, new_app, progress_steps
from quasar.errors import GenerationError
from runtime.cli_options import LISTS, generation_options

if TYPE_CHECKING:
    from runtime.drafters import Drafter
    from runtime.stats import Stats

_WithLists = command_of_lists(**LISTS)
app = new_app("Generate with a verifier engine, prove that speculation is exact, and measure it.")

_Directory = Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")]
_Prompts = Annotated[Path, typer.Option("--prompts", metavar="FILE.jsonl", help="Rows with prompt, messages or turns.")]
_Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="N prompts, one from each category in turn.")]
_Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]
_DrafterName = Annotated[str, typer.Option("--drafter", help="prompt-lookup or none.")]
_DraftTokens = Annotated[int, typer.Option("--num-draft-tokens", metavar="K", help="Drafts per round, at most.")]
_MaxNgram = Annotated[int, typer.Option("--max-ngram", help="Longest n-gram that prompt lookup matches.")]
_MinNgram = Annotated[int, typer.Option("--min-ngram", help="Shortest n-gram that prompt lookup matches.")]
_Threads = Annotated[int, typer.Option("--threads", help="0 takes one per physical core.")]
_Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="onnxruntime, tensorrt or tensorrt-rtx (default: TensorRT where DIR has a plan for this GPU).",
        show_default=False,
    ),
]
_Kernels = Annotated[
    str | None,
    typer.Option(
        "--kernels", help="On ONNX Runtime: native or stock (default: native if possible).", show_default=False
    ),
]


@app.command(cls=_WithLists)
@generation_options()
def generate(
    directory: _Directory,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="One user message.")],
    options: Any,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Feed the prompt as it stands, for base models.")
    ] = False,
    backend: _Backend = None,
    kernels: _Kernels = None,
    threads: _Threads = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Close with counts and speed, on stderr.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --json: log-probabilities of the text and the N likeliest.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming the text.")] = False,
) -> None:
    """Answer PROMPT, streaming the text."""
    import dataclasses

    import runtime

    if logprobs is not None and not json:
        raise GenerationError("--logprobs is printed with --json only: add it")
    engine = runtime.load(directory, backend=backend, kernels=kernels, threads=threads)
    events = engine.stream(prompt, **options, chat_template=not no_chat_template, logprobs=logprobs)
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
        if engine.kernels:
            console().print(f"kernels: {engine.kernels}", soft_wrap=True)


@app.command(cls=_WithLists)
@generation_options()
def chat(
    directory: _Directory,
    options: Any,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the conversation begins with.", show_default=False)
    ] = None,
    backend: _Backend = None,
    kernels: _Kernels = None,
    threads: _Threads = 0,
) -> None:
    """Talk to the model: lines in, answers out. Ctrl-C stops an answer."""
    import contextlib

    import runtime
    from runtime.chat import chat as run_chat

    # Lines can be edited, and recalled with the arrow keys, where Python has readline.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    with runtime.load(directory, backend=backend, kernels=kernels, threads=threads) as engine:
        engine.warmup()
        run_chat(
            engine,
            options,
            system=system or "",
            read=input,
            write=lambda text: print(text, end="", flush=True),
            describe=describe,
        )


@app.command(cls=_WithLists)
@generation_options(max_new_tokens=64)
def verify(
    directory: _Directory,
    prompts: _Prompts,
    options: Any,
    turns: Annotated[
        str, typer.Option("--turns", metavar="first|all", help="all: later turns too, in a conversation.")
    ] = "first",
    limit: _Limit = None,
    backend: _Backend = None,
    kernels: _Kernels = None,
    threads: _Threads = 0,
    json: _Json = None,
) -> None:
    """Decode every prompt plainly and speculatively; exit code 1 if any token or length differs.

    With --temperature both draw with --seed (0 if none is given). With --turns all, plain answers start from an empty
    cache and speculative ones go on with the conversation's. Exit code 1 as well if the drafter drafted nothing at
    all: then nothing was verified.
    """
    import runtime
    from quasar.text import read_prompts

    check_output(json)
    from runtime.parity import verify as run_verify

    if turns not in ("first", "all"):
        raise GenerationError(f"--turns is {turns!r}; first or all was expected")
    if options["deadline"] is not None:
        raise GenerationError("--deadline ends two runs at different places, so they cannot be compared: leave it out")
    if options["seed"] is None:
        options["seed"] = 0
    rows = read_prompts(prompts, limit)
    engine = runtime.load(directory, backend=backend, kernels=kernels, threads=threads)
    with progress_steps("plain and speculative", len(rows)) as step:
        parity = run_verify(
            engine, rows, options, turns="all" if turns == "all" else "first", on_prompt=lambda: step(1)
        )
    reused = f", {parity.reused_tokens} prompt tokens reused" if turns == "all" else ""
    print(
        f"identical: {parity.identical} of {parity.prompts} prompts, {parity.answers} answers, {parity.tokens} tokens, "
        f"{parity.rounds} rounds, acceptance length {parity.acceptance_length:.2f}{reused}"
    )
    for divergence in parity.divergences:
        print(
            f"prompt {divergence.prompt}, turn {divergence.turn}, token {divergence.position}: "
            f"plain {divergence.plain_id}, speculative {divergence.speculative_id}, logit gap {divergence.logit_gap}"
        )
    if json is not None:
        emit_json(parity.to_json(), json)
    if options["drafter"] != "none" and parity.drafted == 0:
        console().print("nothing was drafted, so nothing was verified: give more or longer prompts")
        raise typer.Exit(1)
    if parity.identical != parity.prompts:
        raise typer.Exit(1)


@app.command()
def bench(
    directory: _Directory,
    prompts: _Prompts,
    float_directory: Annotated[
        Path | None, typer.Option("--float", metavar="DIR2", help="An FP32 engine of the same model to compare with.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N")] = 128,
    limit: _Limit = None,
    drafter: _DrafterName = "prompt-lookup",
    num_draft_tokens: _DraftTokens = 5,
    max_ngram: _MaxNgram = 3,
    min_ngram: _MinNgram = 1,
    backend: _Backend = None,
    kernels: _Kernels = None,
    threads: _Threads = 0,
    json: _Json = None,
) -> None:
    """Time {float, quantized} × {plain, speculative}, interleaved prompt by prompt."""
    import runtime
    from quasar.text import read_prompts

    check_output(json)
    from runtime.bench import bench as run_bench
    from runtime.bench import make_arms

    rows = read_prompts(prompts, limit)
    # Two engines take turns here: one pool, so that the idle one costs the other nothing.
    runtime.share_threads(threads)
    quantized = runtime.load(directory, backend=backend, kernels=kernels, threads=threads)
    other = None
    if float_directory is not None:
        other = runtime.load(float_directory, backend=backend, kernels=kernels, threads=threads)
    arms = make_arms(quantized, other, _drafter(drafter, max_ngram, min_ngram))
    with progress_steps("runs", len(rows) * len(arms)) as step:
        result = run_bench(
            arms,
            rows,
            max_new_tokens=max_new_tokens,
            num_draft_tokens=num_draft_tokens,
            on_run=lambda: step(1),
        )
    _print_bench(result)
    if json is not None:
        emit_json(result, json)


@app.command()
def accuracy(
    directory: _Directory,
    prompts: _Prompts,
    float_directory: Annotated[
        Path | None, typer.Option("--float", metavar="DIR2", help="An FP32 engine of the same model to compare with.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N")] = 256,
    limit: _Limit = None,
    backend: _Backend = None,
    kernels: _Kernels = None,
    threads: _Threads = 0,
    json: _Json = None,
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


def describe(stats: "Stats") -> str:
    """One line of counts and speed."""
    reused = f" ({stats.reused_tokens} of them reused)" if stats.reused_tokens else ""
    seed = "" if stats.seed is None else f", seed {stats.seed}"
    return (
        f"{stats.tokens} tokens in {stats.rounds} rounds, acceptance length {stats.acceptance_length:.2f} "
        f"({stats.accepted} of {stats.drafted} drafts accepted), {stats.tokens_per_second:.1f} tokens/s, "
        f"prefill {stats.prompt_tokens} tokens{reused} in {stats.prefill_seconds:.2f} s{seed}"
    )


def _drafter(name: str, max_ngram: int, min_ngram: int) -> "Drafter | str":
    from runtime.drafters import PromptLookup

    return PromptLookup(max_ngram=max_ngram, min_ngram=min_ngram) if name == "prompt-lookup" else name


def _print_bench(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "tokens", "decode s", "tokens/s", "acceptance length", "prefill s"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in result["arms"].items():
        table.add_row(
            name.replace("_", " "),
            str(arm["tokens"]),
            f"{arm['decode_seconds']:.1f}",
            f"{arm['tokens_per_second']:.1f}",
            f"{arm['acceptance_length']:.2f}",
            f"{arm['prefill_seconds']:.1f}",
        )
    out.print(table)
    for name, ratio in result["ratios"].items():
        out.print(f"{name.replace('_', ' ')}: {ratio:.2f}")
    for category, part in result["categories"].items():
        if part["ratios"]:
            figures = ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}" for name, ratio in part["ratios"].items())
            out.print(f"  {category or 'all'}: {figures}", soft_wrap=True)
