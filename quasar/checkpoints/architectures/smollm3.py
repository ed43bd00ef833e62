"""SmolLM3: Llama's form, with layers that do not rotate queries and keys."""

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.huggingface_config import FULL, SLIDING, HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec
from quasar.errors import CheckpointError

_NAME = "smollm3"
_DEFAULTS = {
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "sliding_window": None,
    "no_rope_layer_interval": 4,
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


SMOLLM3 = Architecture(name=_NAME, model_class="SmolLM3ForCausalLM", from_config=_from_config)
