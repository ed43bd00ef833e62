"""InternLM 2 and 2.5: Llama's form under other names, with q, k and v packed by kv head."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.architectures.base import Architecture, FusedRows, GgufFormat, Reference
from quasar.checkpoints.architectures.checks import FLOAT, GGUF
from quasar.checkpoints.architectures.llama import llama_values, restore_pairs
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "internlm2"
_WEIGHT_NAMES: Mapping[str, str] = {
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "lm_head": "output",
}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults({"bias": True, "bos_token_id": 1, "eos_token_id": 2})
    config.refuse_windows()
    # The family's model takes it from the hidden size alone.
    config.refuse("head_dim", None)
    bias = config.flag("bias")
    layer = LayerSpec(attention=config.attention(qkv_bias=bias, output_bias=bias), mlp=config.mlp())
    return config.decoder(_NAME, [layer] * config.num_layers)


def _from_header(header: GgufHeader) -> DecoderSpec:
    return header.decoder(_NAME, [LayerSpec(attention=header.attention(), mlp=header.mlp())] * header.num_layers)


def _packed(first: int, last: int | None) -> FusedRows:
    """Heads `first` to `last` of each kv head's own: its query heads, its key and its value."""
    return FusedRows(stored="attention.wqkv", rows=_heads(first, last))


def _heads(first: int, last: int | None) -> Callable[[LayerSpec], NDArray[np.int64]]:
    def rows(layer: LayerSpec) -> NDArray[np.int64]:
        attention = layer.attention
        rows = np.arange(attention.query_size + 2 * attention.kv_size)
        heads = rows.reshape(attention.num_kv_heads, -1, attention.head_size)
        return heads[:, first:last].reshape(-1)

    return rows


INTERNLM2 = Architecture(
    name=_NAME,
    model_class="InternLM2ForCausalLM",
    from_config=_from_config,
    weight_names=_WEIGHT_NAMES,
    fused={
        "self_attn.q_proj": _packed(0, -2),
        "self_attn.k_proj": _packed(-2, -1),
        "self_attn.v_proj": _packed(-1, None),
    },
    reference=Reference(model_type="llama", values=llama_values),
    # llama.cpp stores q, k and v apart.
    gguf=GgufFormat(architecture=_NAME, from_header=_from_header, restore=restore_pairs),
    models="InternLM 2 and 2.5",
    options="biases of attention",
    tested=(FLOAT, GGUF),
)
