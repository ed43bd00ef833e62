"""A transformers config made from a spec, for the float reference of checkpoints that have none of their own."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.spec import DecoderSpec, Rope


def reference_config(spec: DecoderSpec, model_type: str, values: Mapping[str, Any]) -> Any:
    """The config of that transformers model with the spec's sizes; `values`: what the family's takes beyond them."""
    from transformers import AutoConfig

    layer = spec.layers[0]
    common: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.mlp.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": layer.attention.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tied_head,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_ids) or None,
        # A token of the vocabulary at most: transformers' defaults are those of a family's own vocabulary.
        "pad_token_id": None,
    }
    if spec.ropes:
        common["rope_parameters"] = reference_rope(spec.ropes[0])
    return AutoConfig.for_model(model_type, **{**common, **values})


def reference_rope(rope: Rope) -> dict[str, Any]:
    """A rope as transformers' `rope_parameters`."""
    if rope.kind in ("default", "divided"):
        # Divided frequencies have no transformers form; whoever loads the float model sets them.
        return {"rope_type": "default", "rope_theta": rope.theta}
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.kind == "linear":
        return values
    values["original_max_position_embeddings"] = rope.original_context_length
    if rope.kind == "llama3":
        return values | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.attention_factor is not None:
        values["attention_factor"] = rope.attention_factor
    return values | {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
