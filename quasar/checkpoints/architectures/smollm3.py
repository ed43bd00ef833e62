"""SmolLM3: Llama's form, with layers that do not rotate queries and keys."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.architectures.base import Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, TENSORRT
from quasar.checkpoints.architectures.llama import restore_pairs
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import FULL, SLIDING, HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec
from quasar.errors import CheckpointError

_NAME = "smollm3"
_INTERVAL = 4
_DEFAULTS = {
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "sliding_window": None,
    "no_rope_layer_interval": _INTERVAL,
    "tie_word_embeddings": True,
}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    # 1 is a layer that rotates, for all its name.
    rotates = config.value("no_rope_layers")
    if rotates is None:
        interval = int(config.value("no_rope_layer_interval"))
        rotates = [(layer + 1) % interval != 0 for layer in range(config.num_layers)]
    if len(rotates) < config.num_layers:
        raise CheckpointError(
            f"config.json: no_rope_layers has {len(rotates)} entries; {config.num_layers} were expected"
        )
    windowed = config.flag("use_sliding_window") and config.value("sliding_window") is not None
    if config.value("layer_types") is None:
        kinds = [SLIDING if windowed and not rotates[layer] else FULL for layer in range(config.num_layers)]
        config = config.with_values({"layer_types": kinds})
    # `attention_bias` covers o as well.
    bias, mlp = config.flag("attention_bias"), config.mlp(bias=config.flag("mlp_bias"))
    layers = (
        LayerSpec(
            attention=config.attention(
                rope=config.rope if rotates[layer] else None, qkv_bias=bias, output_bias=bias, window=window
            ),
            mlp=mlp,
        )
        for layer, window in enumerate(config.windows())
    )
    return config.decoder(_NAME, layers)


def _from_header(header: GgufHeader) -> DecoderSpec:
    # llama.cpp stores no layers without rotation: it takes every fourth.
    layers = [
        LayerSpec(attention=header.attention(rope=header.rope() if (layer + 1) % _INTERVAL else None), mlp=header.mlp())
        for layer in range(header.num_layers)
    ]
    return header.decoder(_NAME, layers)


def _transformers_values(spec: DecoderSpec) -> Mapping[str, Any]:
    layer = spec.layers[0]
    return {"attention_bias": layer.attention.qkv_bias, "mlp_bias": layer.mlp.bias, "no_rope_layer_interval": _INTERVAL}


SMOLLM3 = Architecture(
    name=_NAME,
    model_class="SmolLM3ForCausalLM",
    from_config=_from_config,
    gguf=GgufFormat(
        architecture=_NAME,
        from_header=_from_header,
        transformers_values=_transformers_values,
        restore=restore_pairs,
    ),
    models="SmolLM3",
    options="layers without rotation, sliding windows by layer, biases of attention and MLP",
    tested=(FLOAT, NATIVE, CUDA, TENSORRT, GGUF),
)
