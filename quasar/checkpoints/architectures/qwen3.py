"""Qwen3: a norm over each query and key head, and heads of 128 values whatever the hidden size."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.architectures.base import Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, STOCK, TENSORRT
from quasar.checkpoints.architectures.qwen2 import windows
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "qwen3"


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    # `attention_bias` covers o as well.
    bias, mlp = config.flag("attention_bias"), config.mlp()
    layers = (
        LayerSpec(
            attention=config.attention(head_size=128, qkv_bias=bias, output_bias=bias, qk_norm="head", window=window),
            mlp=mlp,
        )
        for window in windows(config)
    )
    return config.decoder(_NAME, layers)


def _from_header(header: GgufHeader) -> DecoderSpec:
    layer = LayerSpec(attention=header.attention(qk_norm="head"), mlp=header.mlp())
    return header.decoder(_NAME, [layer] * header.num_layers)


def _transformers_values(spec: DecoderSpec) -> Mapping[str, Any]:
    attention = spec.layers[0].attention
    return {"head_dim": attention.head_size, "attention_bias": attention.qkv_bias}


QWEN3 = Architecture(
    name=_NAME,
    model_class="Qwen3ForCausalLM",
    from_config=_from_config,
    gguf=GgufFormat(architecture=_NAME, from_header=_from_header, transformers_values=_transformers_values),
    models="Qwen 3, dense",
    options="biases of attention, sliding windows by layer, tied head, wide heads, rope scaling",
    tested=(FLOAT, STOCK, NATIVE, CUDA, TENSORRT, GGUF),
)
