"""Phi-3 and Phi-4: fused projections, a share of each head rotated, and divided frequencies for long contexts."""

from collections.abc import Mapping

from quasar.checkpoints.architectures.base import Architecture, FusedRows, stacked_rows
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "phi3"
_DEFAULTS = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_FUSED: Mapping[str, FusedRows] = {
    **stacked_rows(
        "self_attn.qkv_proj",
        {
            "self_attn.q_proj": lambda layer: layer.attention.query_size,
            "self_attn.k_proj": lambda layer: layer.attention.kv_size,
            "self_attn.v_proj": lambda layer: layer.attention.kv_size,
        },
    ),
    **stacked_rows(
        "mlp.gate_up_proj",
        {
            "mlp.gate_proj": lambda layer: layer.mlp.intermediate_size,
            "mlp.up_proj": lambda layer: layer.mlp.intermediate_size,
        },
    ),
}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    # transformers' model has no biases, and one window for every layer.
    config.refuse("attention_bias", None, False)
    config.refuse("mlp_bias", None, False)
    config.refuse_windows()
    values = config.rope_values
    if values.get("rope_type", values.get("type")) == "yarn":
        # The family's first name of its scaling.
        config = config.with_values({"rope_scaling": {**values, "rope_type": "longrope"}})
    window = config.fitting_window(config.value("sliding_window"))
    layer = LayerSpec(attention=config.attention(rope=config.partial_rope, window=window), mlp=config.mlp())
    return config.decoder(_NAME, [layer] * config.num_layers)


PHI3 = Architecture(name=_NAME, model_class="Phi3ForCausalLM", from_config=_from_config, fused=_FUSED)
