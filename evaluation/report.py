"""The fidelity report of a built engine against its float model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.engine_logits import engine_logits
from calibration.fidelity import compare_several, torch_logits
from calibration.float_model import load_float_model
from calibration.sqnr import read_linear_figures
from calibration.texts import TokenizedText, fingerprint, fit_lengths
from engines import OnnxRuntimeOptions, load_engine
from engines.directory import EngineDirectory
from engines.text import open_codec
from evaluation.continuations import continue_prompts
from quasar.checkpoints import DecoderSpec, open_checkpoint
from quasar.checkpoints.checkpoint import at_length, checkpoint_hash
from quasar.errors import CheckpointError
from quasar.text import Prompt

if TYPE_CHECKING:
    import torch

REPORT_CONTINUATION_TOKENS = 64

Steps = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def report(
    directory: Path, prompts: Sequence[Prompt], *, float_model: str | None, steps: Steps, kernels: str | None = None
) -> dict[str, Any]:
    """Fidelity on the prompts' own tokens and on the float model's 64-token continuations, and figures per linear.

    Args:
        float_model: MODEL to compare with; None takes the recorded source, whose hash must still be the recorded one.
        kernels: as `runtime.load` takes them.
        steps: progress: (description, total) → context manager that gives a function to call per step.

    Raises:
        EngineError: the directory cannot be loaded.
        CheckpointError: the float model cannot be had, has another vocabulary, or has changed.
    """
    loaded = load_engine(directory, options=OnnxRuntimeOptions(kernels=kernels))
    manifest = loaded.directory.manifest
    checkpoint = open_checkpoint(float_model or str(manifest.model["source"]))
    if checkpoint.spec.vocab_size != manifest.contract.vocab_size:
        raise CheckpointError(
            f"{checkpoint.location} has {checkpoint.spec.vocab_size} tokens, the engine "
            f"{manifest.contract.vocab_size}: it is not the model that the engine was built from"
        )
    if float_model is None and checkpoint_hash(checkpoint) != manifest.hashes["checkpoint"]:
        raise CheckpointError(
            f"{checkpoint.location} is not the checkpoint that the engine was built from (its hash differs): "
            "name the float model with --float MODEL"
        )
    model = load_float_model(at_length(checkpoint, manifest.contract.max_length))
    sequences = float_texts(model, checkpoint.spec, loaded.directory, prompts, steps)
    with steps("fidelity", len(sequences)) as step:
        [compared] = compare_several(
            sequences, torch_logits(model), [engine_logits(loaded.session)], on_text=lambda: step(1)
        )
    calibrated = set(manifest.calibration.get("prompt_fingerprints", []))
    return {
        **compared.figures(),
        "prompts": len(sequences),
        "calibration_overlap": sum(fingerprint(prompt) in calibrated for prompt in prompts),
        "details": compared.details(),
        "engine": loaded.directory.path.name,
        "model": manifest.model["name"],
        "kernels": loaded.kernels,
        "precision": manifest.precision,
        "search": manifest.calibration.get("search", {}),
        "linears": read_linear_figures(loaded.directory.path),
    }


def float_texts(
    model: "torch.nn.Module",
    spec: DecoderSpec,
    directory: EngineDirectory,
    prompts: Sequence[Prompt],
    steps: Steps,
) -> list[TokenizedText]:
    """The prompts' tokens, by an engine's tokenizer and template, and the float model's continuations of them."""
    manifest = directory.manifest
    prompt_tokens, num_tokens = fit_lengths(manifest.contract.max_length, REPORT_CONTINUATION_TOKENS)
    codec = open_codec(directory.path, manifest.text)
    token_ids = [tuple(codec.encode_chat(prompt.messages)[:prompt_tokens]) for prompt in prompts]
    with steps("float model continues the prompts", len(token_ids)) as step:
        return continue_prompts(
            model, spec, token_ids, num_tokens=num_tokens, stop_ids=manifest.text.eos_token_ids, on_batch=step
        )
