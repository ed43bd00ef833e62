"""Qwen2 and Qwen2.5: biases on q, k and v alone, and a sliding window from some layer on, where it is switched on."""

from quasar.checkpoints.architectures.base import Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, STOCK, TENSORRT
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "qwen2"


def windows(config: HuggingFaceConfig) -> tuple[int | None, ...]:
    """By layer, Qwen's windows: as `layer_types` says, or else from layer `max_window_layers` on."""
    # The defaults are those of transformers' Qwen2 and Qwen3; null is no window.
    used = config.flag("use_sliding_window") and config.value("sliding_window", 4096) is not None
    if config.value("layer_types") is not None or not used:
        return config.windows()
    first = int(config.value("max_window_layers", 28))
    return tuple(config.window() if layer >= first else None for layer in range(config.num_layers))


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    mlp = config.mlp()
    layers = (
        LayerSpec(attention=config.attention(qkv_bias=True, window=window), mlp=mlp) for window in windows(config)
    )
    return config.decoder(_NAME, layers)


def _from_header(header: GgufHeader) -> DecoderSpec:
    layer = LayerSpec(attention=header.attention(), mlp=header.mlp())
    return header.decoder(_NAME, [layer] * header.num_layers)


QWEN2 = Architecture(
    name=_NAME,
    model_class="Qwen2ForCausalLM",
    from_config=_from_config,
    gguf=GgufFormat(architecture=_NAME, from_header=_from_header),
    models="Qwen 2 and 2.5, Qwen2.5-Coder, DeepSeek-R1-Distill-Qwen",
    options="sliding windows by layer, tied head, rope scaling",
    tested=(FLOAT, STOCK, NATIVE, CUDA, TENSORRT, GGUF),
)
