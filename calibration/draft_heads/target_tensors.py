"""The target that a head is trained for: its float weights, the head's sizes, and what the head begins as."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.draft_heads.data_folder import GeneratedSequence
from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.linear_guess import LinearGuess, TargetParts, linear_guess
from calibration.float_model import to_torch
from engines.manifest import Manifest
from engines.onnxruntime.files import required_native_graph
from quasar.checkpoints import Checkpoint, DecoderSpec, Rope, open_checkpoint
from quasar.checkpoints.architectures.llama import LLAMA
from quasar.checkpoints.checkpoint import checkpoint_hash, read_float32
from quasar.checkpoints.spec import AttentionSpec, LayerSpec, MlpSpec
from quasar.draft_heads.spec import FUSE, DraftHeadSpec
from quasar.errors import BuildError, CheckpointError

Float32 = NDArray[np.float32]

# Of what a head's layer adds to its linear guess at first, as a share of what random weights would.
_QUIET = 0.05
# Beyond the longest sequence, to which an unrolled head runs on.
_FURTHER_POSITIONS = 16


def open_target(directory: Path, manifest: Manifest, model: str | None) -> Checkpoint:
    """The checkpoint that an engine was built from.

    Raises `BuildError` if it is not there any more, or `model` is another; or the engine's hidden states are not its,
    or no head runs on the engine.
    """
    if manifest.is_rotated:
        raise BuildError(
            f"{directory} was built with --rotate, and a draft head learns from hidden states as the checkpoint has "
            "them: train it for an engine that is not rotated"
        )
    if manifest.skipped_layers:
        raise BuildError(
            f"{directory} was built without the layers {manifest.skipped_layers}, and a draft head learns from hidden "
            "states of the whole model: train it for an engine that has all layers"
        )
    required_native_graph(directory, manifest, "on which draft heads run")
    source = manifest.model["source"] if model is None else model
    try:
        checkpoint = open_checkpoint(source)
    except CheckpointError as error:
        if model is not None:
            raise
        raise BuildError(
            f"a draft head begins with the float model's LM head, and the one that {directory} was built from is gone "
            f"({error}): say where it is with --model"
        ) from None
    if checkpoint_hash(checkpoint) != manifest.hashes["checkpoint"]:
        raise BuildError(
            f"{source} is not the model that {directory} was built from (its files' hashes differ): name that one with "
            "--model"
        )
    return checkpoint


def feature_layers_for(num_layers: int) -> tuple[int, ...]:
    """The hidden states that a head reads: what leaves the last layer, which it also guesses."""
    return (num_layers,)


def head_spec(
    target: DecoderSpec, *, num_layers: int, draft_vocab_size: int, intermediate_size: int | None = None
) -> DraftHeadSpec:
    """An EAGLE head of the target's sizes, with an LM head of the rows that it drafts (FR-Spec, arXiv 2502.14856).

    Args:
        num_layers: of the engine, which may lack some of the target's.
        intermediate_size: of the MLP; None: the target's, but at most 4 times the hidden size.
    """
    last = target.layers[-1]
    if intermediate_size is None:
        intermediate_size = min(last.mlp.intermediate_size, 4 * target.hidden_size)
    attention = AttentionSpec(
        num_heads=last.attention.num_heads,
        num_kv_heads=last.attention.num_kv_heads,
        head_size=last.attention.head_size,
        rope=_rope(target),
    )
    decoder = DecoderSpec(
        architecture=LLAMA.name,
        layers=(LayerSpec(attention=attention, mlp=MlpSpec(intermediate_size=intermediate_size, kind=last.mlp.kind)),),
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        context_length=target.context_length,
        rms_norm_eps=target.rms_norm_eps,
    )
    spec = DraftHeadSpec(
        kind="eagle",
        decoder=decoder,
        feature_layers=feature_layers_for(num_layers),
        target_hidden_size=target.hidden_size,
        draft_vocab_size=draft_vocab_size,
        normed=True,
        fuse_bias=True,
    )
    spec.check(replace(target, layers=target.layers[:1] * num_layers))
    return spec


def target_parts(checkpoint: Checkpoint) -> TargetParts:
    """The target's embedding and final norm."""
    return TargetParts(
        embedding=to_torch(checkpoint.read("embed_tokens.weight")),
        norm=to_torch(_norm(checkpoint, "norm.weight")),
        eps=checkpoint.spec.rms_norm_eps,
    )


def first_tensors(
    checkpoint: Checkpoint, spec: DraftHeadSpec, guess: LinearGuess, tokens: NDArray[np.int64], seed: int
) -> dict[str, Float32]:
    """What a head's tensors begin as, by canonical name (`DraftHeadSpec.tensors`).

    `fc` is the linear guess, to which a layer of random weights adds little; the LM head is the target's.

    Args:
        tokens: int64 [draft_vocab_size], the target's token of each that it drafts.
    """
    random, scale = np.random.default_rng(seed), guess.scales.hidden
    shapes = spec.tensors()

    def drawn(name: str) -> Float32:
        rows, inputs = shapes[name]
        return np.asarray(random.standard_normal((rows, inputs)) / np.sqrt(inputs), np.float32)

    at = "layers.0"
    logits_scale = np.float32(checkpoint.spec.logits_scale)
    tensors = {
        f"{FUSE}.weight": guess.weight,
        f"{FUSE}.bias": guess.bias,
        # The norm of what is divided by its scales is one, whatever channels are large.
        f"{at}.post_attention_layernorm.weight": np.sqrt(np.mean(np.square(scale))) / scale,
        **{name: drawn(name) / scale for name in (f"{at}.self_attn.{part}_proj.weight" for part in "qkv")},
        **{name: drawn(name) for name in (f"{at}.mlp.{part}_proj.weight" for part in ("gate", "up"))},
        **{
            name: np.float32(_QUIET) * drawn(name) * scale[:, None]
            for name in (f"{at}.self_attn.o_proj.weight", f"{at}.mlp.down_proj.weight")
        },
        "lm_head.weight": read_float32(checkpoint, "lm_head.weight")[tokens] * logits_scale,
    }
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def first_model(
    checkpoint: Checkpoint,
    spec: DraftHeadSpec,
    learned: Sequence[GeneratedSequence],
    tokens: NDArray[np.int64],
    *,
    num_positions: int,
    seed: int,
    device: str = "cpu",
) -> HeadModel:
    """A head that is to be trained on these sequences, for sequences of up to `num_positions`."""
    target = target_parts(checkpoint)
    guess = linear_guess(learned, target)
    tensors = first_tensors(checkpoint, spec, guess, tokens, seed)
    longest = num_positions + _FURTHER_POSITIONS
    return HeadModel(spec, tensors, target, guess.scales, num_positions=longest, device=device)


def _norm(checkpoint: Checkpoint, name: str) -> Float32:
    return read_float32(checkpoint, name) + np.float32(checkpoint.spec.norm_offset)


def _rope(target: DecoderSpec) -> Rope:
    """That of the last layer which has one, as far as configs of heads can say it."""
    ropes = [layer.attention.rope for layer in target.layers if layer.attention.rope is not None]
    rope = ropes[-1] if ropes else Rope(theta=10000.0)
    if rope.kind == "divided" or rope.rotary_size:
        return Rope(theta=rope.theta)
    return rope
