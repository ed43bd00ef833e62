"""Gemma 3, its text decoder: five layers with a window and a rope of their own, then one that sees everything."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.architectures.base import GGUF_MODULES, GGUF_OUTPUT_NORMS, Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, TENSORRT
from quasar.checkpoints.architectures.gemma2 import (
    WEIGHT_NAMES,
    gemma_decoder,
    gemma_header_decoder,
    gemma_values,
    header_scale,
    stored_norm,
)
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import FULL, SLIDING, HuggingFaceConfig
from quasar.checkpoints.reference_config import reference_rope
from quasar.checkpoints.spec import DecoderSpec, LayerSpec, Rope
from quasar.errors import CheckpointError

_NAME = "gemma3_text"
# Layers of the 27B model; every so many layers, one sees everything.
_LARGE, _PATTERN = 62, 6
_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": _PATTERN,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
# Of layers that see everything, and of those with a window.
_THETAS = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def _ropes(config: HuggingFaceConfig) -> Mapping[str, Rope]:
    """By layer type: `rope_parameters` for each, or `rope_scaling` (of layers that see everything) and two thetas."""
    by_type: dict[str, Any] = dict(config.value("rope_parameters") or {})
    unknown = next((name for name in by_type if name not in _THETAS), None)
    if unknown is not None:
        raise CheckpointError(
            f"unsupported option: rope_parameters names {unknown!r}; parameters for {FULL!r} and {SLIDING!r} were "
            "expected"
        )
    ropes = {}
    for kind, (key, theta) in _THETAS.items():
        values = {"rope_theta": config.value(key, theta), **(by_type.get(kind) or {})}
        if kind == FULL:
            values |= config.value("rope_scaling") or {}
        ropes[kind] = config.rope_from(values)
    return ropes


def _from_header(header: GgufHeader) -> DecoderSpec:
    # llama.cpp stores neither the pattern nor the theta of the layers with a window.
    local = header.rope(theta=header.factor("rope.freq_base_swa", _THETAS[SLIDING][1]))
    scale = header_scale(header, _LARGE)
    layers = [
        LayerSpec(
            attention=header.attention(
                rope=local if sliding else header.rope(),
                qk_norm="head",
                window=header.window() if sliding else None,
                softmax_scale=scale,
            ),
            mlp=header.mlp(kind="gated_gelu_tanh"),
            norms="around",
        )
        for sliding in ((layer + 1) % _PATTERN for layer in range(header.num_layers))
    ]
    return gemma_header_decoder(_NAME, header, layers)


def _transformers_values(spec: DecoderSpec) -> Mapping[str, Any]:
    ropes = {}
    for layer, one in enumerate(spec.layers):
        if one.attention.rope is not None:
            ropes[SLIDING if (layer + 1) % _PATTERN else FULL] = reference_rope(one.attention.rope)
    return {**gemma_values(spec), "rope_parameters": ropes}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    config.refuse("use_bidirectional_attention", None, False)
    # transformers' model leaves it out.
    config.refuse("attn_logit_softcapping", None)
    if config.value("layer_types") is None:
        period = int(config.value("sliding_window_pattern"))
        pattern = [SLIDING if (layer + 1) % period else FULL for layer in range(config.num_layers)]
        config = config.with_values({"layer_types": pattern})
    # `attention_bias` covers o as well.
    bias, window = config.flag("attention_bias"), config.fitting_window(config.value("sliding_window"))
    ropes = _ropes(config)
    layers = [
        LayerSpec(
            attention=config.attention(
                rope=ropes[kind],
                qkv_bias=bias,
                output_bias=bias,
                qk_norm="head",
                window=window if kind == SLIDING else None,
                softmax_scale=float(config.value("query_pre_attn_scalar")) ** -0.5,
            ),
            mlp=config.mlp(activation="hidden_activation"),
            norms="around",
        )
        for kind in config.layer_types()
    ]
    return gemma_decoder(_NAME, config, layers)


GEMMA3 = Architecture(
    name=_NAME,
    model_class="Gemma3ForCausalLM",
    # Its images are left out.
    wrapper_classes=("Gemma3ForConditionalGeneration",),
    from_config=_from_config,
    weight_names=WEIGHT_NAMES,
    gguf=GgufFormat(
        architecture="gemma3",
        from_header=_from_header,
        transformers_values=_transformers_values,
        modules=GGUF_MODULES | GGUF_OUTPUT_NORMS,
        restore=stored_norm,
    ),
    models="Gemma 3, text alone (images are left out)",
    options="sliding windows and ropes by layer, a soft cap of logits, rope scaling",
    tested=(FLOAT, NATIVE, CUDA, TENSORRT, GGUF),
)
