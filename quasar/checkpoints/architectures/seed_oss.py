"""Seed-OSS: Llama's form with biases on q, k and v, another switch for that of o, and heads of 128 values."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.architectures.base import GGUF_MODULES, Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import FLOAT, GGUF, STOCK
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "seed_oss"
_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    config.refuse_windows()
    attention = config.attention(qkv_bias=config.flag("attention_bias"), output_bias=config.flag("attention_out_bias"))
    mlp = config.mlp(bias=config.flag("mlp_bias"))
    return config.decoder(_NAME, [LayerSpec(attention=attention, mlp=mlp)] * config.num_layers)


def _from_header(header: GgufHeader) -> DecoderSpec:
    layer = LayerSpec(attention=header.attention(), mlp=header.mlp())
    return header.decoder(_NAME, [layer] * header.num_layers)


def _transformers_values(spec: DecoderSpec) -> Mapping[str, Any]:
    layer = spec.layers[0]
    return {
        "head_dim": layer.attention.head_size,
        "attention_bias": layer.attention.qkv_bias,
        "attention_out_bias": layer.attention.output_bias,
        "mlp_bias": layer.mlp.bias,
    }


SEED_OSS = Architecture(
    name=_NAME,
    model_class="SeedOssForCausalLM",
    from_config=_from_config,
    gguf=GgufFormat(
        architecture=_NAME,
        from_header=_from_header,
        transformers_values=_transformers_values,
        # Before the MLP, for all its name.
        modules=GGUF_MODULES | {"post_attention_layernorm": "post_attention_norm"},
    ),
    models="Seed-OSS",
    options="biases of attention (q, k and v; o by another switch) and MLP, rope scaling",
    tested=(FLOAT, STOCK, GGUF),
)
