"""OLMo 2: norms after attention and MLP, and one norm over all query heads together and over all key heads."""

from collections.abc import Mapping

from quasar.checkpoints.architectures.base import (
    GGUF_MODULES,
    GGUF_OUTPUT_NORMS,
    POST_NORM_SMOOTHING,
    Architecture,
    GgufFormat,
)
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, STOCK, TENSORRT
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "olmo2"
_WEIGHT_NAMES: Mapping[str, str] = {
    "attention_output_layernorm": "post_attention_layernorm",
    "mlp_output_layernorm": "post_feedforward_layernorm",
}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults({"rms_norm_eps": 1e-5})
    config.refuse_windows()
    # `attention_bias` covers o as well.
    bias = config.flag("attention_bias")
    attention = config.attention(qkv_bias=bias, output_bias=bias, qk_norm="row")
    layer = LayerSpec(attention=attention, mlp=config.mlp(), norms="after")
    return config.decoder(_NAME, [layer] * config.num_layers)


def _from_header(header: GgufHeader) -> DecoderSpec:
    layer = LayerSpec(attention=header.attention(qk_norm="row"), mlp=header.mlp(), norms="after")
    return header.decoder(_NAME, [layer] * header.num_layers)


OLMO2 = Architecture(
    name=_NAME,
    model_class="Olmo2ForCausalLM",
    from_config=_from_config,
    weight_names=_WEIGHT_NAMES,
    gguf=GgufFormat(
        architecture=_NAME,
        from_header=_from_header,
        transformers_values=lambda spec: {"attention_bias": spec.layers[0].attention.qkv_bias},
        modules=GGUF_MODULES | GGUF_OUTPUT_NORMS,
    ),
    smoothing=POST_NORM_SMOOTHING,
    models="OLMo 2",
    options="norms after attention and MLP, biases of attention",
    tested=(FLOAT, STOCK, NATIVE, CUDA, TENSORRT, GGUF),
)
