"""Mistral: Llama's form, with one sliding window for every layer where the config has one."""

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.architectures.checks import FLOAT, NATIVE
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec
from quasar.errors import CheckpointError

_NAME = "mistral"
_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    window = config.fitting_window(config.value("sliding_window"))
    if window is not None and config.value("layer_types") is not None:
        # transformers' model gives every layer the window, whatever this says.
        raise CheckpointError("unsupported option: layer_types beside the sliding_window of every layer")
    layer = LayerSpec(attention=config.attention(window=window), mlp=config.mlp())
    return config.decoder(_NAME, [layer] * config.num_layers)


# llama.cpp stores the family as Llama.
MISTRAL = Architecture(
    name=_NAME,
    model_class="MistralForCausalLM",
    from_config=_from_config,
    models="Mistral 7B, Mistral Nemo",
    options="one sliding window for every layer or none, tied head; its GGUF files say llama",
    tested=(FLOAT, NATIVE),
)
