"""Gemma 2: norms around attention and MLP, windows in every other layer, soft caps, and a GELU gate."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.architectures.base import GGUF_MODULES, GGUF_OUTPUT_NORMS, Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, STOCK, TENSORRT
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import FULL, SLIDING, HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "gemma2"
# Layers of the 27B model.
_LARGE = 46
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


def stored_norm(name: str, value: NDArray[Any], _: DecoderSpec) -> NDArray[Any]:
    """llama.cpp stores norms with the 1 that the model adds."""
    return value - np.float32(1) if name.endswith("norm.weight") else value


def header_scale(header: GgufHeader, large: int) -> float:
    """The factor on scores, which headers lack: llama.cpp knows the largest Gemma of a generation by its layers."""
    heads = int(header.value("attention.head_count"))
    size = int(header.value("embedding_length")) // heads if header.num_layers == large else header.head_size
    return float(size**-0.5)


def gemma_header_decoder(
    name: str, header: GgufHeader, layers: list[LayerSpec], *, logits_softcap: float = 0.0
) -> DecoderSpec:
    """As `gemma_decoder`. `logits_softcap`: where the header has none."""
    return replace(
        header.decoder(name, layers),
        embedding_scale=float(int(header.value("embedding_length")) ** 0.5),
        logits_softcap=header.factor("final_logit_softcapping", logits_softcap),
        norm_offset=1.0,
    )


def gemma_values(spec: DecoderSpec) -> dict[str, Any]:
    """What a Gemma config of transformers takes beyond what all of them do."""
    attention = spec.layers[0].attention
    windows = [layer.attention.window for layer in spec.layers]
    return {
        "head_dim": attention.head_size,
        "attention_bias": attention.qkv_bias,
        "query_pre_attn_scalar": round(attention.scale**-2),
        "attn_logit_softcapping": attention.softcap or None,
        "final_logit_softcapping": spec.logits_softcap or None,
        "sliding_window": next((window for window in windows if window is not None), spec.context_length),
    }


def _from_header(header: GgufHeader) -> DecoderSpec:
    # The first converters wrote no soft caps; llama.cpp has these defaults.
    scale, softcap = header_scale(header, _LARGE), header.factor("attn_logit_softcapping", 50.0)
    layers = [
        LayerSpec(
            attention=header.attention(
                window=None if layer % 2 else header.window(), softmax_scale=scale, softcap=softcap
            ),
            mlp=header.mlp(kind="gated_gelu_tanh"),
            norms="around",
        )
        for layer in range(header.num_layers)
    ]
    return gemma_header_decoder(_NAME, header, layers, logits_softcap=30.0)


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
    gguf=GgufFormat(
        architecture=_NAME,
        from_header=_from_header,
        transformers_values=gemma_values,
        modules=GGUF_MODULES | GGUF_OUTPUT_NORMS,
        restore=stored_norm,
    ),
    models="Gemma 2",
    options="sliding windows by layer, soft caps of scores and logits, biases of attention, wide heads",
    tested=(FLOAT, STOCK, NATIVE, CUDA, TENSORRT, GGUF),
)
