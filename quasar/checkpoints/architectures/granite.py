"""Granite: Llama's form, with factors on embeddings, attention scores, the residual stream and logits."""

from dataclasses import replace

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "granite"


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config.refuse_windows()
    # `attention_bias` covers o as well.
    bias, mlp = config.flag("attention_bias"), config.mlp(bias=config.flag("mlp_bias"))
    scale = float(config.value("attention_multiplier", 1.0))
    layer = LayerSpec(
        attention=config.attention(qkv_bias=bias, output_bias=bias, softmax_scale=scale),
        mlp=mlp,
        residual_scale=float(config.value("residual_multiplier", 1.0)),
    )
    return replace(
        config.decoder(_NAME, [layer] * config.num_layers),
        embedding_scale=float(config.value("embedding_multiplier", 1.0)),
        logits_scale=1 / float(config.value("logits_scaling", 1.0)),
    )


GRANITE = Architecture(name=_NAME, model_class="GraniteForCausalLM", from_config=_from_config)
