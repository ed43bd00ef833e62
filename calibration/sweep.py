"""The trade-off between fidelity and price over a set of recipes: each is built, measured, and put into one table."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.engine_logits import engine_logits
from calibration.fidelity import compare_several, torch_logits
from calibration.report import Steps, float_texts
from engines import load_engine
from engines.costs import CURVE_ROWS, measure_interleaved
from engines.directory import open_directory
from engines.onnxruntime.threads import share_threads
from quasar.checkpoints import DecoderSpec, open_checkpoint
from quasar.errors import BuildError
from quasar.files import write_json
from quasar.text import Prompt

_PRECISIONS = ("w8a8-static", "w8a8", "w8a8-block")
_ALPHAS = ("off", "0.5", "auto")
# Every combination: none / static / per token / blocks × smoothing × LM head.
ALL_RECIPES = (
    "fp32",
    *(
        f"{precision},alpha={alpha}{head}"
        for precision in _PRECISIONS
        for alpha in _ALPHAS
        for head in ("", ",head=float")
    ),
    "auto,kl=0.01",
)
DEFAULT_RECIPES = (
    "fp32",
    *(f"w8a8,alpha={alpha}" for alpha in _ALPHAS),
    "w8a8,alpha=auto,head=float",
    "w8a8-block,alpha=auto",
    "auto,kl=0.01",
)
_WIDTHS = (1, 8)
_INT8_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptEngine:
    """One recipe: its engine, what a pass reads, fidelity, and milliseconds by kernels and width."""

    recipe: str
    directory: Path
    bytes_per_pass: int
    fidelity: dict[str, Any]
    ms: dict[str, dict[int, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The sweep's entry."""
        return {
            "recipe": self.recipe,
            "engine": self.directory.name,
            "bytes_per_pass": self.bytes_per_pass,
            "fidelity": self.fidelity,
            "ms": {kernels: {str(width): ms for width, ms in curve.items()} for kernels, curve in self.ms.items()},
        }


def build_arguments(recipe: str) -> list[str]:
    """What `python -m export build` is asked for: `PRECISION[,alpha=…][,head=float][,kl=…]`.

    Raises `BuildError` for a recipe that cannot be read.
    """
    precision, *parts = recipe.split(",")
    options = {"alpha": "--alpha", "kl": "--max-kl", "top1": "--min-top1"}
    arguments = ["--precision", precision]
    for part in parts:
        key, _, value = part.partition("=")
        if part == "head=float":
            arguments += ["--keep-float", "lm_head"]
        elif key in options and value:
            arguments += [options[key], value]
        else:
            raise BuildError(
                f"recipe {recipe!r} has the part {part!r}; "
                "PRECISION[,alpha=…][,head=float][,kl=…][,top1=…] was expected"
            )
    return arguments


def build_engines(model: str, output: Path, recipes: Sequence[str], extra: Sequence[str] = ()) -> dict[str, Path]:
    """Recipe → engine directory below `output`; those that are there already are taken as they are.

    Each build runs in a process of its own. Raises `BuildError` naming the recipe that cannot be built.
    """
    directories = {}
    for recipe in recipes:
        arguments = build_arguments(recipe)
        directory = output / recipe.replace(",", "-").replace("=", "")
        if not (directory / "manifest.json").is_file():
            command = [sys.executable, "-m", "export", "build", model, "-o", str(directory), *arguments, *extra]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603 - our own command
            if done.returncode:
                raise BuildError(f"recipe {recipe!r} could not be built (its message is above)")
        directories[recipe] = directory
    return directories


def sweep(model: str, directories: dict[str, Path], prompts: Sequence[Prompt], steps: Steps) -> list[SweptEngine]:
    """Measure engines of one model: fidelity on the same texts, passes interleaved on one thread pool."""
    share_threads()
    checkpoint = open_checkpoint(model)
    swept = _measure_fidelity(checkpoint, directories, prompts, steps)
    for kernels in ("native", "stock"):
        timed = [engine for engine in swept if kernels == "stock" or _has_native(engine.directory)]
        sessions = [load_engine(engine.directory, kernels=kernels).session for engine in timed]
        with steps(f"passes, {kernels} kernels", 1) as step:
            surfaces = measure_interleaved(sessions, rows=[CURVE_ROWS], widths=_WIDTHS, repeats=25)
            step(1)
        for engine, surface in zip(timed, surfaces, strict=True):
            engine.ms[kernels] = surface[CURVE_ROWS]
        del sessions
    return swept


def _measure_fidelity(
    checkpoint: Any, directories: dict[str, Path], prompts: Sequence[Prompt], steps: Steps
) -> list[SweptEngine]:
    from calibration.float_model import load_float_model

    float_model = load_float_model(checkpoint)
    opened = {recipe: open_directory(path) for recipe, path in directories.items()}
    texts = float_texts(float_model, checkpoint.spec, next(iter(opened.values())), prompts, steps)
    readers = [engine_logits(load_engine(path).session) for path in directories.values()]
    with steps("fidelity", len(texts)) as step:
        compared = compare_several(texts, torch_logits(float_model), readers, on_text=lambda: step(1))
    return [
        SweptEngine(
            recipe=recipe,
            directory=directories[recipe],
            bytes_per_pass=bytes_per_pass(checkpoint.spec, directory.manifest.linears),
            fidelity=comparison.figures(),
        )
        for (recipe, directory), comparison in zip(opened.items(), compared, strict=True)
    ]


def bytes_per_pass(spec: DecoderSpec, linears: dict[str, str]) -> int:
    """Bytes of weights and scales that a pass reads: every linear once. The KV cache and norms come on top."""
    total = 0
    for linear in spec.linears():
        values = linear.inputs * linear.outputs
        scales = {"float": 0, "w8a8-block": values // 32}.get(linears[linear.name], linear.outputs)
        total += (4 if linears[linear.name] == "float" else 1) * values + _INT8_SCALE_BYTES * scales
    return total


def _has_native(directory: Path) -> bool:
    return bool(open_directory(directory).manifest.onnxruntime.native_graph)


def write_sweep(swept: Sequence[SweptEngine], folder: Path) -> None:
    """`sweep.json`, `sweep.md` and `sweep.svg` in a folder."""
    from calibration.plots import trade_off

    write_json(folder / "sweep.json", {"engines": [engine.to_json() for engine in swept]})
    (folder / "sweep.md").write_text(markdown_table(swept), encoding="utf-8")
    (folder / "sweep.svg").write_text(trade_off(swept), encoding="utf-8")


def markdown_table(swept: Sequence[SweptEngine]) -> str:
    """The sweep as a Markdown table."""
    kernels = [name for name in ("native", "stock") if any(name in engine.ms for engine in swept)]
    columns = ["recipe", "KL prompts", "KL answers", "top-1 prompts", "top-1 answers", "perplexity", "MB a pass"]
    columns += [f"t({width}) {name}" for name in kernels for width in _WIDTHS]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for engine in swept:
        prompts, answers = engine.fidelity, engine.fidelity["continuation"]
        row = [engine.recipe, f"{prompts['mean_kl_nats']:.4f}", f"{answers['mean_kl_nats']:.4f}"]
        row += [f"{100 * figures['top1_agreement']:.1f} %" for figures in (prompts, answers)]
        row += [f"{prompts['perplexity']:.2f}", f"{engine.bytes_per_pass / 1e6:.0f}"]
        row += [f"{engine.ms[name][width]:.1f}" if name in engine.ms else "-" for name in kernels for width in _WIDTHS]
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
