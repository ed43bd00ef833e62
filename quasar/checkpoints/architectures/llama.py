"""Llama, and what has its form under another name: SmolLM2, TinyLlama, Yi, Falcon 3."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from quasar.checkpoints.architectures.base import Architecture, GgufFormat
from quasar.checkpoints.architectures.checks import CUDA, FLOAT, GGUF, NATIVE, STOCK, TENSORRT
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec, split_name

_NAME = "llama"


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    # `attention_bias` covers o as well.
    config.refuse_windows()
    bias, mlp = config.flag("attention_bias"), config.mlp(bias=config.flag("mlp_bias"))
    layer = LayerSpec(attention=config.attention(qkv_bias=bias, output_bias=bias), mlp=mlp)
    return config.decoder(_NAME, [layer] * config.num_layers)


def _from_header(header: GgufHeader) -> DecoderSpec:
    layer = LayerSpec(attention=header.attention(), mlp=header.mlp())
    return header.decoder(_NAME, [layer] * header.num_layers)


def llama_values(spec: DecoderSpec) -> Mapping[str, Any]:
    """What a Llama config of transformers takes beyond what all of them do."""
    layer = spec.layers[0]
    return {
        "head_dim": layer.attention.head_size,
        "attention_bias": layer.attention.qkv_bias,
        "mlp_bias": layer.mlp.bias,
    }


def restore_pairs(name: str, value: NDArray[Any], spec: DecoderSpec) -> NDArray[Any]:
    """llama.cpp stores q and k rows pairwise interleaved; they are put back into the order of the two halves."""
    layer, rest = split_name(name)
    if layer is None:
        return value
    attention = spec.layers[layer].attention
    heads = {"self_attn.q_proj": attention.num_heads, "self_attn.k_proj": attention.num_kv_heads}
    rotated = heads.get(rest.rpartition(".")[0])
    return value if rotated is None else _halves_from_pairs(value, rotated)


def _halves_from_pairs(value: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo llama.cpp's interleaving of rotated pairs: rows [heads × (size/2, 2)] → [heads × (2, size/2)]."""
    pairs = value.reshape(num_heads, value.shape[0] // num_heads // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


LLAMA = Architecture(
    name=_NAME,
    model_class="LlamaForCausalLM",
    from_config=_from_config,
    gguf=GgufFormat(
        architecture=_NAME,
        from_header=_from_header,
        transformers_values=llama_values,
        restore=restore_pairs,
    ),
    models="Llama 2 and 3, SmolLM2, TinyLlama, Yi, Falcon 3",
    options="biases of attention and MLP, tied head, rope scaling",
    tested=(FLOAT, STOCK, NATIVE, CUDA, TENSORRT, GGUF),
)
