"""Writes a draft head as others read it: SafeAILab's tensor names, SpecForge's config keys, safetensors."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.architectures.llama import LLAMA
from quasar.checkpoints.spec import Rope
from quasar.draft_heads.folder import check_targets
from quasar.draft_heads.layouts import BASE_MODEL, EAGLE, EAGLE3, FEATURE_LAYERS, draft_head_spec
from quasar.draft_heads.spec import DraftHeadSpec
from quasar.errors import CheckpointError
from quasar.files import atomic_path, safetensors_errors, write_json

_ACTIVATIONS = {"gated_silu": "silu", "gated_gelu_tanh": "gelu_pytorch_tanh"}


def write_draft_head(
    folder: Path,
    spec: DraftHeadSpec,
    tensors: Mapping[str, NDArray[Any]],
    targets: NDArray[np.int64],
    base_model: str,
) -> None:
    """Write a head so that `open_draft_head` and others' engines read it; each file is whole or not there.

    `tensors`: by canonical name, all of `spec.tensors()`, in the precision in which they are stored. `targets`: int64
    [draft_vocab_size], ascending. `base_model`: the name of the model that it was trained for.

    Raises `CheckpointError` naming a tensor that is not the spec's, or an option that the layout has no word for.
    """
    from safetensors.numpy import save_file

    shapes = {name: value.shape for name, value in tensors.items()}
    if shapes != spec.tensors():
        wrong = sorted(name for name in {*shapes, *spec.tensors()} if shapes.get(name) != spec.tensors().get(name))[0]
        raise CheckpointError(
            f"the tensor {wrong!r} of the draft head has shape {shapes.get(wrong)}; its spec asks for "
            f"{spec.tensors().get(wrong)}"
        )
    if targets.shape != (spec.draft_vocab_size,):
        raise CheckpointError(f"{targets.shape} tokens for a draft head that drafts {spec.draft_vocab_size}")
    check_targets(targets, spec.decoder.vocab_size, "the draft head")
    config = _config(spec, base_model, tensors["fc.weight"].dtype.name)
    _check_readable(config, spec)
    stored = {_stored_name(name, spec): np.ascontiguousarray(value) for name, value in tensors.items()}
    if spec.reduces_vocabulary:
        stored["d2t"] = (targets - np.arange(len(targets))).astype(np.int64)
        stored["t2d"] = np.isin(np.arange(spec.decoder.vocab_size), targets)
    with safetensors_errors(), atomic_path(folder / "model.safetensors") as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def _stored_name(name: str, spec: DraftHeadSpec) -> str:
    return name.replace("layers.0.", "midlayer.", 1) if spec.kind == "eagle3" else name


def _config(spec: DraftHeadSpec, base_model: str, dtype: str) -> dict[str, Any]:
    decoder, layer = spec.decoder, spec.decoder.layers[0]
    attention = layer.attention
    config: dict[str, Any] = {
        "architectures": [EAGLE3 if spec.kind == "eagle3" else EAGLE],
        "model_type": LLAMA.name,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": layer.mlp.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_size,
        "hidden_act": _ACTIVATIONS[layer.mlp.kind],
        "max_position_embeddings": decoder.context_length,
        "rms_norm_eps": decoder.rms_norm_eps,
        "attention_bias": attention.qkv_bias,
        "mlp_bias": layer.mlp.bias,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    if attention.rope is not None:
        config |= {"rope_theta": attention.rope.theta, "rope_scaling": _rope_scaling(attention.rope)}
    if attention.window is not None:
        config |= {"layer_types": ["sliding_attention"], "sliding_window": attention.window}
    # SafeAILab's code takes the target's embedding unless it is there.
    if spec.target_hidden_size != decoder.hidden_size:
        config["target_hidden_size"] = spec.target_hidden_size
    if spec.kind == "eagle3" or spec.reduces_vocabulary:
        config["draft_vocab_size"] = spec.draft_vocab_size
    if spec.kind == "eagle3":
        config |= {
            # vLLM counts the layers that are entered, SpecForge and sglang those that are left.
            FEATURE_LAYERS: list(spec.feature_layers),
            "eagle_config": {
                FEATURE_LAYERS: [entered - 1 for entered in spec.feature_layers],
                "use_aux_hidden_state": True,
            },
            "norm_before_residual": spec.norm_before_residual,
            "norm_before_fc": spec.feature_norm == "all",
            "fc_norm": spec.feature_norm == "each",
            "norm_output": spec.norm_output,
        }
    # The bias of fc, to SafeAILab and sglang; vLLM's EAGLE-3 reads it as o_proj's.
    if spec.kind == "eagle" or spec.fuse_bias:
        config["bias"] = spec.fuse_bias
    if base_model:
        config[BASE_MODEL] = base_model
    return config


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    values: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    match rope.kind:
        case "llama3":
            values |= {
                "original_max_position_embeddings": rope.original_context_length,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
            }
        case "yarn":
            values |= {
                "original_max_position_embeddings": rope.original_context_length,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "attention_factor": rope.attention_factor,
                "truncate": rope.truncate,
            }
        case "linear":
            pass
        case "default" | "divided":
            return None
    return values


def _check_readable(config: Mapping[str, Any], spec: DraftHeadSpec) -> None:
    """Raise `CheckpointError` naming what the written config would not say."""
    decoder = replace(spec.decoder, architecture=LLAMA.name, tied_head=False, bos_token_id=None, eos_token_ids=())
    read = draft_head_spec(
        config,
        spec.tensors(),
        num_layers=spec.feature_layers[-1],
        context_length=decoder.context_length,
    )
    for one, other in ((read, replace(spec, decoder=read.decoder)), (read.decoder, decoder)):
        for field in fields(one):
            came, expected = getattr(other, field.name), getattr(one, field.name)
            if came != expected:
                raise CheckpointError(
                    f"unsupported option: {field.name} {came!r} of a draft head that is written; its config.json would "
                    f"be read as {expected!r}"
                )
