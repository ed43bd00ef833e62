"""Granite: Llama's form, with factors on embeddings, attention scores, the residual stream and logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quasar.checkpoints.architectures.base import Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, STOCK
from quasar.checkpoints.architectures.llama import restore_pairs
from quasar.checkpoints.gguf_header import GgufHeader
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


def _from_header(header: GgufHeader) -> DecoderSpec:
    layer = LayerSpec(
        attention=header.attention(softmax_scale=header.factor("attention.scale", 1.0)),
        mlp=header.mlp(),
        residual_scale=header.factor("residual_scale", 1.0),
    )
    return replace(
        header.decoder(_NAME, [layer] * header.num_layers),
        embedding_scale=header.factor("embedding_scale", 1.0),
        logits_scale=1 / header.factor("logit_scale", 1.0),
    )


def _transformers_values(spec: DecoderSpec) -> Mapping[str, Any]:
    layer = spec.layers[0]
    return {
        "attention_bias": layer.attention.qkv_bias,
        "mlp_bias": layer.mlp.bias,
        "attention_multiplier": layer.attention.scale,
        "residual_multiplier": layer.residual_scale,
        "embedding_multiplier": spec.embedding_scale,
        "logits_scaling": 1 / spec.logits_scale,
    }


GRANITE = Architecture(
    name=_NAME,
    model_class="GraniteForCausalLM",
    from_config=_from_config,
    gguf=GgufFormat(
        architecture=_NAME,
        from_header=_from_header,
        transformers_values=_transformers_values,
        restore=restore_pairs,
    ),
    models="Granite 3.x, dense",
    options="factors on embeddings, scores, residual and logits, biases of attention and MLP, tied head",
    tested=(FLOAT, STOCK, NATIVE, CUDA, GGUF),
)
