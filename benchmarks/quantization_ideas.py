"""What each step of the search brings to W8A8, and each way of rounding to 4 bits: a walk over the model for every one.

    python benchmarks/quantization_ideas.py smollm2 build/smollm2-w8a8
    python benchmarks/quantization_ideas.py smollm2 build/smollm2-w8a8 --precision w4a8 --rotate

With `--precision`, the ways of `--weights` are compared: rtn, gptq and awq, and with all that a build does where none
is named. With `--rotate` the float model's weights are turned before (`calibration.rotation`): a checkpoint that stands
on a grid of 4 bits is then on none.

The engine lends its tokenizer and chat template. A seed decides which calibration texts are held out: nothing is fitted
to them, and they give the figures. Errors are those that a step is judged by, means over blocks of the share by which
the step made them smaller; KL is that of the whole fake-quantized model.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from calibration.block_search import FITTED, HELD_OUT, BlockSearch, Walked
from calibration.float_blocks import FloatBlocks
from calibration.precisions.catalog import DEFAULT_CHOICE, precisions_for, rungs_above
from calibration.recipe import make_recipe
from calibration.rotation import rotated
from calibration.search import WeightRounding, steps_of
from calibration.texts import (
    CALIBRATION_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    TokenizedText,
    calibration_prompts,
    calibration_tokens,
    fit_texts,
    tokenize,
)
from calibration.validation_split import split_validation
from engines.directory import open_directory
from engines.text import open_codec
from quasar.checkpoints import Checkpoint, open_checkpoint
from quasar.files import write_json

IDEAS: Mapping[str, tuple[str, ...]] = {
    "alpha 0.5": (),
    "alpha per group": ("alpha per group",),
    "learned smoothing": ("refined factors",),
    "alpha per group, learned smoothing": ("alpha per group", "refined factors"),
    "learned smoothing, GPTQ": ("refined factors", "reconstructed rounding"),
}
ROUNDINGS: tuple[WeightRounding | None, ...] = ("rtn", "awq", "gptq", None)


def main() -> None:
    """Walk with every list of steps and every seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("engine", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ideas", nargs="+", choices=list(IDEAS), default=list(IDEAS), help="of W8A8")
    parser.add_argument("--precision", nargs="+", default=[], help="roundings of these in place of ideas for W8A8")
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    checkpoint, directory = open_checkpoint(options.model), open_directory(options.engine)
    if options.rotate:
        checkpoint = rotated(checkpoint)
    walks = [(idea, None, IDEAS[idea]) for idea in options.ideas]
    if options.precision:
        walks = [
            (rounding or "all of them", name, steps_of(precisions_for(name)[0], "normal", rounding))
            for name in options.precision
            for rounding in ROUNDINGS
        ]
    codec = open_codec(directory.path, directory.manifest.text)
    prompts = calibration_prompts(None)
    tokenized = tokenize(prompts, codec, prompt_tokens=MAX_PROMPT_TOKENS, answer_tokens=CALIBRATION_ANSWER_TOKENS)
    _, texts = fit_texts(prompts, tokenized, calibration_tokens(checkpoint.spec.num_parameters()))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for idea, choice, steps in walks:
            start = time.monotonic()
            walked = walk(checkpoint, texts, seed, steps, choice)
            seconds = time.monotonic() - start
            for precision, divergence in walked.divergences.items():
                row = {**divergence.to_json(), "seconds": seconds, "steps": walked.trace}
                found.setdefault(f"{idea}, {precision}", []).append(row)
            print(f"seed {seed}, {idea}{f', {choice}' if choice else ''}: {seconds:.0f} s", flush=True)
    print_table(found)
    if options.json is not None:
        write_json(options.json, found)


def walk(
    checkpoint: Checkpoint, texts: Sequence[TokenizedText], seed: int, steps: Sequence[str], choice: str | None
) -> Walked:
    """A walk with these steps; `choice` None: with W8A8 per token, and in blocks beside it."""
    fitted, held_out = split_validation(texts, seed)
    recipe = make_recipe(checkpoint.spec, precision=choice, alpha="auto")
    rungs = rungs_above(precisions_for(DEFAULT_CHOICE)[0]) if choice is None else ()
    with tempfile.TemporaryDirectory() as folder:
        return BlockSearch(
            FloatBlocks(checkpoint),
            recipe,
            {FITTED: fitted, HELD_OUT: held_out},
            Path(folder),
            quiet,
            alternatives=rungs,
            steps=steps,
        ).run()


def print_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Means over the seeds, with the smallest and the largest, as a Markdown table."""
    print("| | KL | KL, answers | top-1 | errors smaller by | seconds |")
    print("|---|---|---|---|---|---|")
    for name, runs in found.items():
        cells = []
        for key, digits, factor in (("kl", 4, 1), ("answers_kl", 4, 1), ("top1", 1, 100)):
            values = [factor * run[key] for run in runs]
            cells.append(f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        gains = [f"{100 * mean(gain):.0f} %" for gain in zip(*(_gains(run) for run in runs), strict=True)]
        seconds = f"{mean(run['seconds'] for run in runs):.0f}"
        print(f"| {name} | {' | '.join(cells)} | {', '.join(gains) or '-'} | {seconds} |")


def _gains(run: Mapping[str, Any]) -> list[float]:
    return [step["gain"] for step in run["steps"]]


@contextmanager
def quiet(description: str, total: int | None) -> Iterator[Callable[[int], None]]:  # noqa: ARG001 - shows nothing
    """No progress."""
    yield lambda count: None


if __name__ == "__main__":
    main()
