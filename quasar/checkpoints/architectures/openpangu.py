"""openPangu Embedded: Llama's form with biases on q, k, v and o."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.architectures.base import Architecture, Reference
from quasar.checkpoints.architectures.checks import FLOAT
from quasar.checkpoints.architectures.llama import llama_values
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec

_NAME = "PanguEmbedded"
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "rope_theta": 16000000.0,
    "rms_norm_eps": 1e-5,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 45892,
}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    config.refuse_windows()
    config.refuse("mlp_bias", None, False)
    bias = config.flag("bias")
    layer = LayerSpec(attention=config.attention(qkv_bias=bias, output_bias=bias), mlp=config.mlp())
    return config.decoder(_NAME, [layer] * config.num_layers)


OPENPANGU = Architecture(
    name=_NAME,
    model_class="PanguEmbeddedForCausalLM",
    from_config=_from_config,
    reference=Reference(model_type="llama", values=llama_values),
    models="openPangu Embedded",
    options="biases of attention",
    tested=(FLOAT,),
)
