"""Phi-3 and Phi-4: fused projections, a share of each head rotated, and divided frequencies for long contexts."""

from collections.abc import Callable, Mapping
from typing import Any

from quasar.checkpoints.architectures.base import Architecture, FusedRows, GgufFormat, stacked_rows
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, TENSORRT
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.reference_config import reference_rope
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "phi3"
_DEFAULTS = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def _fused(qkv: str, gate_up: str) -> Mapping[str, FusedRows]:
    """The parts of the two fused projections, by what a format calls these."""
    attention: Mapping[str, Callable[[LayerSpec], int]] = {
        "self_attn.q_proj": lambda layer: layer.attention.query_size,
        "self_attn.k_proj": lambda layer: layer.attention.kv_size,
        "self_attn.v_proj": lambda layer: layer.attention.kv_size,
    }
    mlp: Mapping[str, Callable[[LayerSpec], int]] = {
        "mlp.gate_proj": lambda layer: layer.mlp.intermediate_size,
        "mlp.up_proj": lambda layer: layer.mlp.intermediate_size,
    }
    return {**stacked_rows(qkv, attention), **stacked_rows(gate_up, mlp)}


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


def _from_header(header: GgufHeader) -> DecoderSpec:
    attention = header.attention(rope=header.rope(partial=True), window=header.window())
    return header.decoder(_NAME, [LayerSpec(attention=attention, mlp=header.mlp())] * header.num_layers)


def _transformers_values(spec: DecoderSpec) -> Mapping[str, Any]:
    attention = spec.layers[0].attention
    rope = spec.ropes[0]
    share = rope.rotated(attention.head_size) / attention.head_size
    return {
        "head_dim": attention.head_size,
        "sliding_window": attention.window,
        "rope_parameters": {**reference_rope(rope), "partial_rotary_factor": share},
    }


PHI3 = Architecture(
    name=_NAME,
    model_class="Phi3ForCausalLM",
    from_config=_from_config,
    fused=_fused("self_attn.qkv_proj", "mlp.gate_up_proj"),
    gguf=GgufFormat(
        architecture=_NAME,
        from_header=_from_header,
        transformers_values=_transformers_values,
        fused=_fused("attn_qkv", "ffn_up"),
    ),
    models="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
    options="a share of each head rotated, one sliding window, longrope",
    tested=(FLOAT, NATIVE, CUDA, TENSORRT, GGUF),
)
