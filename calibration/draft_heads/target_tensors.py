"""The target that a head is trained for: its float weights, the head's sizes, and what the head begins as."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Manifest
from quasar.checkpoints import Checkpoint, DecoderSpec, Rope, open_checkpoint
from quasar.checkpoints.architectures.llama import LLAMA
from quasar.checkpoints.checkpoint import checkpoint_hash, read_float32
from quasar.checkpoints.skipped_layers import remaining_layers
from quasar.checkpoints.spec import AttentionSpec, LayerSpec, MlpSpec
from quasar.draft_heads.spec import FUSE, DraftHeadSpec
from quasar.errors import BuildError, CheckpointError

Float32 = NDArray[np.float32]

# What passes at first is about the token before the one to draft: so sure of it, the head had more to unlearn.
_CONFIDENCE = 0.3
# Of weights that no weight of the target stands for.
_DEVIATION = 0.02


def open_target(directory: Path, manifest: Manifest, model: str | None) -> Checkpoint:
    """The checkpoint that an engine was built from.

    Raises `BuildError` if it is not there any more, or `model` is another.
    """
    source = manifest.model["source"] if model is None else model
    try:
        checkpoint = open_checkpoint(source)
    except CheckpointError as error:
        if model is not None:
            raise
        raise BuildError(
            f"a draft head begins as a part of the float model, and the one that {directory} was built from is gone "
            f"({error}): say where it is with --model"
        ) from None
    if checkpoint_hash(checkpoint) != manifest.hashes["checkpoint"]:
        raise BuildError(
            f"{source} is not the model that {directory} was built from (its files' hashes differ): name that one with "
            "--model"
        )
    return checkpoint


def feature_layers_for(num_layers: int) -> tuple[int, ...]:
    """The layers whose input a head reads: EAGLE-3's low, middle and high one; of few layers, what there is."""
    if num_layers >= 8:
        return 2, num_layers // 2, num_layers - 3
    return tuple(dict.fromkeys((1, max(1, num_layers // 2), max(1, num_layers - 1))))


def head_spec(
    target: DecoderSpec, *, num_layers: int, draft_vocab_size: int, intermediate_size: int | None = None
) -> DraftHeadSpec:
    """An EAGLE-3 head of the target's sizes.

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
        kind="eagle3",
        decoder=decoder,
        feature_layers=feature_layers_for(num_layers),
        target_hidden_size=target.hidden_size,
        draft_vocab_size=draft_vocab_size,
    )
    spec.check(replace(target, layers=target.layers[:1] * num_layers))
    return spec


def first_tensors(
    checkpoint: Checkpoint, spec: DraftHeadSpec, manifest: Manifest, tokens: NDArray[np.int64], seed: int
) -> dict[str, Float32]:
    """What a head's tensors begin as, by canonical name (`DraftHeadSpec.tensors`).

    Its layer is the engine's last one, which reads the hidden state and not yet the embedding; of the hidden states
    that come in, the high one passes; norm and LM head are the target's. Where the target's layer is of another form,
    small random values.

    Args:
        tokens: int64 [draft_vocab_size], the target's token of each that it drafts.
    """
    target, random = checkpoint.spec, np.random.default_rng(seed)
    tensors: dict[str, Float32] = {}
    for name, shape in spec.tensors().items():
        values = np.ones(shape) if len(shape) == 1 else random.standard_normal(shape) * _DEVIATION
        tensors[name] = values.astype(np.float32)
    hidden = target.hidden_size
    high = len(spec.feature_layers) - 1
    tensors[f"{FUSE}.weight"][:, high * hidden : (high + 1) * hidden] += np.eye(hidden, dtype=np.float32)
    layers = remaining_layers(manifest.skipped_layers, target.num_layers)
    tensors["lm_head.weight"] = read_float32(checkpoint, "lm_head.weight")[tokens]
    tensors["norm.weight"] = _norm(checkpoint, "norm.weight") * np.float32(_CONFIDENCE * target.logits_scale)
    last = target.layers[layers[-1]]
    if last.norms != "before":
        return tensors
    at, own = f"layers.{layers[-1]}", "layers.0"
    tensors[f"{own}.hidden_norm.weight"] = _norm(checkpoint, f"{at}.input_layernorm.weight")
    # What the first layer reads are embeddings.
    tensors[f"{own}.input_layernorm.weight"] = _norm(checkpoint, f"layers.{layers[0]}.input_layernorm.weight")
    tensors[f"{own}.post_attention_layernorm.weight"] = _norm(checkpoint, f"{at}.post_attention_layernorm.weight")
    # Queries and keys that a norm follows have lengths of their own.
    projections = "qkv" if last.attention.qk_norm is None else "v"
    for part in projections:
        tensors[f"{own}.self_attn.{part}_proj.weight"][:, hidden:] = read_float32(
            checkpoint, f"{at}.self_attn.{part}_proj.weight"
        )
    if "q" in projections:
        # The head's own factor is that of its size.
        factor = last.attention.scale * last.attention.head_size**0.5
        tensors[f"{own}.self_attn.q_proj.weight"][:, hidden:] *= np.float32(factor)
    scale = np.float32(last.residual_scale)
    tensors[f"{own}.self_attn.o_proj.weight"] = scale * read_float32(checkpoint, f"{at}.self_attn.o_proj.weight")
    _take_mlp(checkpoint, at, tensors, scale)
    return tensors


def _take_mlp(checkpoint: Checkpoint, at: str, tensors: dict[str, Float32], scale: np.float32) -> None:
    """The target's MLP; of a smaller one, the neurons that write most."""
    gate, up, down = (read_float32(checkpoint, f"{at}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    own = {part: tensors[f"layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")}
    count = min(len(gate), len(own["gate"]))
    weights = np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0)
    kept = np.sort(np.argsort(-weights, kind="stable")[:count])
    own["gate"][:count], own["up"][:count], own["down"][:, :count] = gate[kept], up[kept], scale * down[:, kept]


def _norm(checkpoint: Checkpoint, name: str) -> Float32:
    return read_float32(checkpoint, name) + np.float32(checkpoint.spec.norm_offset)


def _rope(target: DecoderSpec) -> Rope:
    """That of the last layer which has one, as far as configs of heads can say it."""
    ropes = [layer.attention.rope for layer in target.layers if layer.attention.rope is not None]
    rope = ropes[-1] if ropes else Rope(theta=10000.0)
    if rope.kind == "divided" or rope.rotary_size:
        return Rope(theta=rope.theta)
    return rope
