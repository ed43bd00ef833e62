"""Gemma 2: norms around attention and MLP, windows in every other layer, soft caps, and a GELU gate."""

from collections.abc import Mapping
from dataclasses import replace

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.huggingface_config import FULL, SLIDING, HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "gemma2"
_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
# Gemma 3 has the same.
WEIGHT_NAMES: Mapping[str, str] = {
    "attention_output_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_layernorm": "post_feedforward_layernorm",
}


def gemma_decoder(name: str, config: HuggingFaceConfig, layers: list[LayerSpec]) -> DecoderSpec:
    """What every Gemma has: embeddings times the root of their size, stored norms from which 1 was subtracted."""
    return replace(
        config.decoder(name, layers),
        embedding_scale=float(config.size("hidden_size") ** 0.5),
        logits_softcap=float(config.value("final_logit_softcapping") or 0.0),
        norm_offset=1.0,
    )


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    config.refuse("use_bidirectional_attention", None, False)
    if config.value("layer_types") is None:
        alternating = [FULL if layer % 2 else SLIDING for layer in range(config.num_layers)]
        config = config.with_values({"layer_types": alternating})
    # `attention_bias` covers o as well.
    bias, window = config.flag("attention_bias"), config.fitting_window(config.value("sliding_window"))
    layers = [
        LayerSpec(
            attention=config.attention(
                qkv_bias=bias,
                output_bias=bias,
                window=window if kind == SLIDING else None,
                softmax_scale=float(config.value("query_pre_attn_scalar")) ** -0.5,
                softcap=float(config.value("attn_logit_softcapping") or 0.0),
            ),
            mlp=config.mlp(activation="hidden_activation"),
            norms="around",
        )
        for kind in config.layer_types()
    ]
    return gemma_decoder(_NAME, config, layers)


GEMMA2 = Architecture(
    name=_NAME,
    model_class="Gemma2ForCausalLM",
    from_config=_from_config,
    weight_names=WEIGHT_NAMES,
)
