"""InternLM 3: Llama's form, with heads of 128 values and two names for its biases."""

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.architectures.checks import FLOAT
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec
from quasar.errors import CheckpointError

_NAME = "internlm3"
_DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}


def _from_config(config: HuggingFaceConfig) -> DecoderSpec:
    config = config.with_defaults(_DEFAULTS)
    config.refuse_windows()
    qkv_bias = bool(config.value("qkv_bias", config.flag("attention_bias")))
    bias = bool(config.value("bias", config.flag("mlp_bias")))
    if qkv_bias != bias:
        # transformers' model has one switch for q, k, v and o, and the family's own has another for o.
        raise CheckpointError(f"unsupported option: qkv_bias {qkv_bias} beside bias {bias}")
    attention = config.attention(qkv_bias=bias, output_bias=bias)
    return config.decoder(_NAME, [LayerSpec(attention=attention, mlp=config.mlp(bias=bias))] * config.num_layers)


INTERNLM3 = Architecture(
    name=_NAME,
    model_class="InternLM3ForCausalLM",
    # transformers runs the family as Llama, and saves it so.
    other_classes=("LlamaForCausalLM",),
    from_config=_from_config,
    models="InternLM 3",
    options="biases of attention and MLP together",
    tested=(FLOAT,),
)
