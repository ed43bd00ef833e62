"""What each idea brings to W8A8 per token: KL and top-1, fake-quantized, over calibration seeds, on prompts of yours.

    python benchmarks/quantization_ideas.py smollm2 build/smollm2-w8a8 --prompts FILE.jsonl --limit 60

The engine lends its tokenizer and chat template. A seed decides which calibration texts are the validation split. The
ideas are those of `calibration.search`, each upon the one before, and two that it does not use: activations that
saturate below their token's amax, and a bias that takes back the mean error of every output.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from calibration.fake_quantization import FakeQuantizedLinear, LinearForm, fake_quantized
from calibration.fidelity import LogitsReader, compare_several, torch_logits
from calibration.float_model import load_float_model
from calibration.quantized_model import QuantizedModel
from calibration.recipe import make_recipe
from calibration.search import STEPS, Search
from calibration.statistics import collect_statistics
from calibration.texts import (
    CALIBRATION_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    calibration_prompts,
    calibration_tokens,
    fit_texts,
    tokenize,
)
from calibration.validation_split import ValidationSplit, split_validation
from engines.directory import open_directory
from engines.text import open_codec
from evaluation.report import float_texts
from quasar.checkpoints import DecoderSpec, open_checkpoint
from quasar.files import write_json
from quasar.text import read_prompts

if TYPE_CHECKING:
    import torch

_CLIP = 0.95


class Clipped:
    """Activations that saturate at 95 % of their token's amax."""

    def __init__(self, form: FakeQuantizedLinear) -> None:
        self._form = form

    def product(self, x: "torch.Tensor", /) -> "torch.Tensor":
        """As the linear's, of tokens whose largest values are cut off."""
        factor = self._form.factor
        smoothed = x if factor is None else x / factor
        limit = _CLIP * smoothed.abs().amax(-1, keepdim=True)
        clipped = smoothed.clamp(-limit, limit)
        return self._form.product(clipped if factor is None else clipped * factor)


class Corrected:
    """A bias that takes back the mean error of every output over the calibration sample."""

    def __init__(self, form: FakeQuantizedLinear, x: "torch.Tensor", weight: "torch.Tensor") -> None:
        self._form = form
        self._error = (form.product(x) - x @ weight.t()).mean(0)

    def product(self, x: "torch.Tensor", /) -> "torch.Tensor":
        """As the linear's, less the mean error."""
        return self._form.product(x) - self._error


def main() -> None:
    """Search with every seed, measure what every idea reached, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("engine", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    checkpoint, directory = open_checkpoint(options.model), open_directory(options.engine)
    spec, model = checkpoint.spec, load_float_model(checkpoint)
    texts = float_texts(model, spec, directory, read_prompts(options.prompts, options.limit), quiet)
    codec = open_codec(directory.path, directory.manifest.text)
    prompts = calibration_prompts(None)
    tokenized = tokenize(prompts, codec, prompt_tokens=MAX_PROMPT_TOKENS, answer_tokens=CALIBRATION_ANSWER_TOKENS)
    _, calibration = fit_texts(prompts, tokenized, calibration_tokens(spec.num_parameters()))
    recipe = make_recipe(spec, precision="w8a8", alpha="auto")
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        fitted, held_out = split_validation(calibration, seed)
        statistics = collect_statistics(model, spec, [text.tokens for text in fitted])
        validation = ValidationSplit(model, held_out, spec.vocab_size)
        with tempfile.TemporaryDirectory() as scratch:

            def search(name: str, *, clip_weights: bool = True) -> Search:
                folder = Path(scratch) / name
                return Search(model, spec, recipe, statistics, folder, quiet, clip_weights=clip_weights)  # noqa: B023

            ideas = forms_of(search, validation, spec)
            readers = [fake_quantized_logits(model, spec, linears) for linears in ideas.values()]
            for name, compared in zip(ideas, compare_several(texts, torch_logits(model), readers), strict=True):
                found.setdefault(name, []).append(compared.figures())
        print(f"seed {seed} done", flush=True)
    print_table(found)
    if options.json is not None:
        write_json(options.json, found)


def forms_of(
    search: Callable[..., Search], validation: ValidationSplit, spec: DecoderSpec
) -> dict[str, Mapping[str, LinearForm]]:
    """Idea → every linear under it."""

    def best(name: str, steps: int, *, clip_weights: bool = True) -> QuantizedModel:
        return search(name, clip_weights=clip_weights).run(validation, STEPS[:steps])[0]

    ideas: dict[str, Mapping[str, LinearForm]] = {
        "alpha 0.5": best("0", 0).fake_quantized_linears(),
        "alpha per group": best("1", 1, clip_weights=False).fake_quantized_linears(),
        "+ clipped weight ranges": best("1-clipped", 1).fake_quantized_linears(),
        "+ refined factors": best("2", 2).fake_quantized_linears(),
    }
    last = best("3", 3).fake_quantized_linears()
    ideas["+ reconstructed rounding"] = last
    samples = {linear.name: search("samples").sample(linear) for linear in spec.linears()}
    ideas["+ bias correction (not used)"] = {
        name: Corrected(form, samples[name].x, samples[name].weight) for name, form in last.items()
    }
    ideas["+ activations clipped at 95 % (not used)"] = {name: Clipped(form) for name, form in last.items()}
    return ideas


def fake_quantized_logits(
    model: "torch.nn.Module", spec: DecoderSpec, linears: Mapping[str, LinearForm]
) -> LogitsReader:
    """Reads logits of the model with those linears in place of its own."""

    def read(tokens: Sequence[int]) -> Iterator[Any]:
        with fake_quantized(model, spec, linears):
            logits = list(torch_logits(model)(tokens))
        yield from logits

    return read


def print_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Means over the seeds, with the smallest and the largest, as a Markdown table."""
    print("| | KL, prompts | KL, answers | top-1, prompts | top-1, answers |")
    print("|---|---|---|---|---|")
    for name, runs in found.items():
        cells = []
        for key, digits, factor in (("mean_kl_nats", 4, 1), ("top1_agreement", 1, 100)):
            for part in ("prompts", "continuation"):
                values = [factor * (run if part == "prompts" else run[part])[key] for run in runs]
                cells.append(f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        print(f"| {name} | {' | '.join(cells)} |")


@contextmanager
def quiet(description: str, total: int | None) -> Iterator[Callable[[int], None]]:  # noqa: ARG001 - shows nothing
    """No progress."""
    yield lambda count: None


if __name__ == "__main__":
    main()
