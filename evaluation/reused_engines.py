"""Engines that a sweep finds where it would build: whether they are what it would build, and what they have read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from calibration.texts import (
    CALIBRATION_ANSWER_TOKENS,
    calibration_prompts,
    calibration_tokens,
    fingerprint,
    fit_lengths,
    fit_texts,
    prompts_hash,
    tokenize,
)
from engines.directory import EngineDirectory, open_directory
from engines.text import open_codec
from export.build_options import BuildOptions
from quasar.checkpoints import DecoderSpec, open_checkpoint
from quasar.checkpoints.checkpoint import checkpoint_hash
from quasar.errors import BuildError
from quasar.text import Prompt


def check_engines(there: Sequence[BuildOptions]) -> None:
    """Raise `BuildError` naming the first engine that is not what its options would build; all are of one model."""
    checkpoint = open_checkpoint(there[0].model)
    expected_hash = checkpoint_hash(checkpoint)
    for options in there:
        opened = open_directory(options.output)
        manifest = opened.manifest
        if manifest.hashes["checkpoint"] != expected_hash:
            what = f"built from another checkpoint than {options.model} (their files' hashes differ)"
        elif manifest.precision != options.precision:
            what = f"an engine of the precision {manifest.precision}, not {options.precision}"
        elif _calibrated_alike(opened, checkpoint.spec, options.calibration):
            continue
        else:
            what = f"calibrated on other prompts than {options.calibration or 'the default ones'}"
        raise BuildError(f"{options.output} is {what}: delete that folder, or take another -o")


def _calibrated_alike(opened: EngineDirectory, spec: DecoderSpec, calibration: Path | None) -> bool:
    """Whether an engine was calibrated on what a build would take of these prompts; of nothing, that is so."""
    manifest = opened.manifest
    if not manifest.hashes["calibration"]:
        return True
    prompts = calibration_prompts(calibration)
    prompt_tokens, answer_tokens = fit_lengths(manifest.contract.max_length, CALIBRATION_ANSWER_TOKENS)
    codec = open_codec(opened.path, manifest.text)
    texts = tokenize(prompts, codec, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)
    taken, _ = fit_texts(prompts, texts, calibration_tokens(spec.num_parameters()))
    return prompts_hash(taken) == manifest.hashes["calibration"]


def num_calibrated_on(directories: Mapping[str, Path], prompts: Sequence[Prompt]) -> int:
    """How many of the prompts any of the engines was calibrated on: figures measured there flatter."""
    calibrated: set[str] = set()
    for path in directories.values():
        calibrated.update(open_directory(path).manifest.calibration.get("prompt_fingerprints", ()))
    return sum(fingerprint(prompt) in calibrated for prompt in prompts)
