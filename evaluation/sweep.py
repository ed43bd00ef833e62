"""The trade-off between fidelity and latency over a set of recipes: each is built, measured, and put into one table."""

import contextlib
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import runtime
from calibration.engine_logits import engine_logits
from calibration.fidelity import compare_several, torch_logits
from calibration.float_model import load_float_model
from calibration.precisions.catalog import (
    AUTO,
    DEFAULT_CHOICE,
    FLOAT,
    STORED_CHOICES,
    choices,
    ladder,
    precision_of,
)
from calibration.recipe import make_recipe
from engines import OnnxRuntimeOptions, load_engine
from engines.directory import open_directory
from engines.latency import CURVE_LENGTH, measure_interleaved
from engines.manifest import MANIFEST_NAME
from engines.onnxruntime.files import onnxruntime_files
from engines.onnxruntime.kernels import STOCK, choose_kernels
from engines.onnxruntime.threads import share_threads
from evaluation.accuracy import MAX_NEW_TOKENS, accuracy, is_scored, num_scored
from evaluation.plots import trade_off
from evaluation.prompt_lengths import refuse_long
from evaluation.report import Steps, float_texts
from evaluation.reused_engines import check_engines
from evaluation.swept_engine import SweptEngine
from export.build_options import BuildOptions
from quasar.checkpoints import DecoderSpec, open_checkpoint
from quasar.checkpoints.checkpoint import at_length
from quasar.cli import run
from quasar.errors import BuildError, QuasarError
from quasar.files import sha256_file, write_json
from quasar.text import Prompt, read_prompts

# Coarsest first.
_PRECISIONS = tuple(choice for choice in choices() if choice not in (AUTO, *STORED_CHOICES, FLOAT.choice))
_ALPHAS = ("off", "0.5", "auto")
# Every combination: none / 4 bits / static / per token / blocks × smoothing × LM head.
ALL_RECIPES = (
    FLOAT.choice,
    *(
        f"{precision},alpha={alpha}{head}"
        for precision in _PRECISIONS
        for alpha in _ALPHAS
        for head in ("", ",head=float")
    ),
    f"{AUTO},kl=0.01",
    *STORED_CHOICES,
)
DEFAULT_RECIPES = (
    FLOAT.choice,
    *(f"{DEFAULT_CHOICE},alpha={alpha}" for alpha in _ALPHAS),
    f"{DEFAULT_CHOICE},alpha=auto,head=float",
    *(
        f"{precision.choice},alpha=auto"
        for precision in ladder()
        if precision.choice not in (DEFAULT_CHOICE, FLOAT.choice)
    ),
    f"{AUTO},kl=0.01",
)
# Part of a recipe → the build's option.
_BOUNDS = {"kl": "max_kl", "top1": "min_top1"}
_WIDTHS = (1, 8)


def build_options(recipe: str, model: str, output: Path, calibration: Path | None = None) -> BuildOptions:
    """What is built for a recipe `PRECISION[,alpha=…][,head=float][,kl=…][,top1=…]`, into its folder below `output`.

    Raises `BuildError` for a recipe that cannot be read.
    """
    precision, *parts = recipe.split(",")
    if precision not in choices():
        raise BuildError(f"recipe {recipe!r} begins with {precision!r}; {', '.join(choices())} were expected")
    asked: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        try:
            if part == "head=float":
                asked["keep_float"] = ("lm_head",)
            elif key == "alpha" and value:
                asked["alpha"] = value
            else:
                asked[_BOUNDS[key]] = float(value)
        except (KeyError, ValueError):
            raise BuildError(
                f"recipe {recipe!r} has the part {part!r}; "
                "PRECISION[,alpha=…][,head=float][,kl=…][,top1=…] was expected"
            ) from None
    return BuildOptions(
        model=model,
        output=output / recipe.replace(",", "-").replace("=", ""),
        precision=precision,
        calibration=None if precision == FLOAT.choice else calibration,
        **asked,
    )


def possible_recipes(model: str, recipes: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The recipes that this model can have, and of the others why not: inputs that their groups do not divide."""
    spec = open_checkpoint(model).spec
    possible, refused = [], {}
    for recipe in recipes:
        options = build_options(recipe, model, Path())
        try:
            make_recipe(spec, precision=options.precision, alpha="off", keep_float=options.keep_float)
        except BuildError as error:
            refused[recipe] = str(error)
        else:
            possible.append(recipe)
    return possible, refused


def build_engines(model: str, output: Path, recipes: Sequence[str], calibration: Path | None = None) -> dict[str, Path]:
    """Recipe → engine directory below `output`; those that are there already are taken as they are.

    Each build runs in a process of its own. Raises `BuildError` naming the recipe that cannot be built, or the folder
    of an engine that was built from something else.
    """
    asked = {recipe: build_options(recipe, model, output, calibration) for recipe in recipes}
    there = [options for options in asked.values() if (options.output / MANIFEST_NAME).is_file()]
    if there:
        check_engines(there)
    for recipe, options in asked.items():
        if options not in there and _build_apart(options):
            raise BuildError(f"recipe {recipe!r} could not be built (its message is above)")
    return {recipe: options.output for recipe, options in asked.items()}


def _build_apart(options: BuildOptions) -> int | None:
    """Build in a new process, which gives its memory back; its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(options,))
    process.start()
    process.join()
    return process.exitcode


def _build(options: BuildOptions) -> NoReturn:
    # Heavy libraries that only this process needs.
    from export.build import build
    from export.cli import ConsoleReporter

    # stdout is the sweep's own.
    with contextlib.redirect_stdout(sys.stderr):
        run(lambda: build(options, ConsoleReporter()))


def score_tasks(directories: Mapping[str, Path], prompts: Path, steps: Steps) -> dict[str, dict[str, Any]]:
    """Recipe → what `evaluation.accuracy` finds on all rows of a prompt file, saved beside each engine.

    Raises `BuildError` naming the recipe that cannot be scored.
    """
    share_threads()
    scored = {}
    for recipe, directory in directories.items():
        path = directory.with_name(f"{directory.name}-tasks.json")
        of = {"engine": open_directory(directory).manifest.engine_hash, "prompts": sha256_file(prompts)}
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if saved.get("of") != of:
            try:
                saved = {"of": of, "tasks": _score(directory, read_prompts(prompts), steps)}
            except QuasarError as error:
                raise BuildError(f"tasks of recipe {recipe!r} could not be scored: {error}") from None
            write_json(path, saved)
        scored[recipe] = {metric: found["engines"]["quantized"] for metric, found in saved["tasks"].items()}
    return scored


def _score(directory: Path, prompts: Sequence[Prompt], steps: Steps) -> dict[str, Any]:
    with runtime.load(directory) as engine, steps("answers", num_scored(prompts)) as step:
        engines = {"quantized": engine}
        refuse_long(engines.values(), prompts, is_asked=is_scored)
        return accuracy(engines, prompts, max_new_tokens=MAX_NEW_TOKENS, on_prompt=lambda: step(1))


def sweep(
    model: str,
    directories: Mapping[str, Path],
    prompts: Sequence[Prompt],
    steps: Steps,
    tasks: Mapping[str, dict[str, Any]] | None = None,
) -> list[SweptEngine]:
    """Measure engines of one model: fidelity on the same prompts, passes interleaved on one thread pool.

    `tasks`: what `score_tasks` found, for the table.
    """
    share_threads()
    checkpoint = open_checkpoint(model)
    fidelity = _measure_fidelity(checkpoint, directories, prompts, steps)
    ms = _measure_passes(directories, steps)
    return [
        SweptEngine(
            recipe=recipe,
            directory=directory,
            bytes_per_pass=bytes_per_pass(checkpoint.spec, open_directory(directory).manifest.linears),
            fidelity=fidelity[recipe],
            tasks=(tasks or {}).get(recipe, {}),
            ms=ms[recipe],
        )
        for recipe, directory in directories.items()
    ]


def _measure_passes(directories: Mapping[str, Path], steps: Steps) -> dict[str, dict[str, dict[int, float]]]:
    """Recipe → kernels → width → milliseconds."""
    ms: dict[str, dict[str, dict[int, float]]] = {recipe: {} for recipe in directories}
    for kernels in ("native", "stock"):
        timed = [recipe for recipe, path in directories.items() if kernels == "stock" or _has_native(path)]
        options = OnnxRuntimeOptions(kernels=kernels)
        sessions = [load_engine(directories[recipe], options=options).session for recipe in timed]
        with steps(f"passes, {kernels} kernels", 1) as step:
            surfaces = measure_interleaved(sessions, lengths=[CURVE_LENGTH], widths=_WIDTHS, repeats=25)
            step(1)
        for recipe, surface in zip(timed, surfaces, strict=True):
            ms[recipe][kernels] = surface[CURVE_LENGTH]
        del sessions
    return ms


def _measure_fidelity(
    checkpoint: Any, directories: Mapping[str, Path], prompts: Sequence[Prompt], steps: Steps
) -> dict[str, dict[str, Any]]:
    """Recipe → figures."""
    some = open_directory(next(iter(directories.values())))
    float_model = load_float_model(at_length(checkpoint, some.manifest.contract.max_length))
    sequences = float_texts(float_model, checkpoint.spec, some, prompts, steps)
    readers = [engine_logits(load_engine(path).session) for path in directories.values()]
    with steps("fidelity", len(sequences)) as step:
        compared = compare_several(sequences, torch_logits(float_model), readers, on_text=lambda: step(1))
    return {recipe: comparison.figures() for recipe, comparison in zip(directories, compared, strict=True)}


def bytes_per_pass(spec: DecoderSpec, linears: dict[str, str]) -> int:
    """Bytes of weights and scales that a pass reads: every linear once. The KV cache and norms come on top."""
    return sum(precision_of(linears[linear.name]).num_bytes(linear.outputs, linear.inputs) for linear in spec.linears())


def _has_native(directory: Path) -> bool:
    return choose_kernels(None, onnxruntime_files(open_directory(directory).manifest)).name != STOCK


def write_sweep(swept: Sequence[SweptEngine], folder: Path) -> None:
    """`sweep.json`, `sweep.md` and `sweep.svg` in a folder."""
    write_json(folder / "sweep.json", {"engines": [engine.to_json() for engine in swept]})
    (folder / "sweep.md").write_text(markdown_table(swept), encoding="utf-8")
    (folder / "sweep.svg").write_text(trade_off(swept), encoding="utf-8")


def markdown_table(swept: Sequence[SweptEngine]) -> str:
    """The sweep as a Markdown table."""
    kernels = [name for name in ("native", "stock") if any(name in engine.ms for engine in swept)]
    metrics = list(dict.fromkeys(metric for engine in swept for metric in engine.tasks))
    columns = ["recipe", "KL prompts", "KL answers", "top-1 prompts", "top-1 answers", "perplexity"]
    columns += [*metrics, "MB a pass"]
    columns += [f"t({width}) {name}" for name in kernels for width in _WIDTHS]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for engine in swept:
        prompts, answers = engine.fidelity, engine.fidelity["continuation"]
        row = [engine.recipe, f"{prompts['mean_kl_nats']:.4f}", f"{answers['mean_kl_nats']:.4f}"]
        row += [f"{100 * figures['top1_agreement']:.1f} %" for figures in (prompts, answers)]
        row += [f"{prompts['perplexity']:.2f}"]
        row += [_with_interval(engine.tasks[metric]) if metric in engine.tasks else "-" for metric in metrics]
        row += [f"{engine.bytes_per_pass / 1e6:.0f}"]
        row += [f"{engine.ms[name][width]:.1f}" if name in engine.ms else "-" for name in kernels for width in _WIDTHS]
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _with_interval(score: Mapping[str, float]) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
