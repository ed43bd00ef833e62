"""What a decoder family says of itself; `registry` lists the families."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, split_name

# Canonical module → llama.cpp's, in a block or outside of blocks, for pre-norm decoders.
GGUF_MODULES: Mapping[str, str] = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothingGroup:
    """A linear whose input channels can be divided by a factor where they are made.

    `producer`: the norm or projection whose output channels are divided; `consumer`: the linear whose weight is
    multiplied, both by canonical name, without the layer. `shared_by_query_heads`: the consumer reads query heads and
    the producer makes kv heads, so the query heads that read one kv head share its factor.
    """

    producer: str
    consumer: str
    shared_by_query_heads: bool = False


PRE_NORM_SMOOTHING = (
    SmoothingGroup(producer="input_layernorm", consumer="self_attn.qkv_proj"),
    SmoothingGroup(producer="self_attn.v_proj", consumer="self_attn.o_proj", shared_by_query_heads=True),
    SmoothingGroup(producer="post_attention_layernorm", consumer="mlp.gate_up_proj"),
    SmoothingGroup(producer="mlp.up_proj", consumer="mlp.down_proj"),
    SmoothingGroup(producer="norm", consumer="lm_head"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFormat:
    """How llama.cpp stores a family.

    `architecture`: its `general.architecture`, which its other keys start with. `from_header`: header → spec.
    `transformers_values`: what the family's transformers config takes beyond what all of them do. `modules`: canonical
    module → llama.cpp's. `restore`: (canonical name, stored tensor, spec) → the tensor as transformers has it.
    """

    architecture: str
    from_header: Callable[[GgufHeader], DecoderSpec]
    transformers_values: Callable[[DecoderSpec], Mapping[str, Any]] = lambda spec: {}
    modules: Mapping[str, str] = field(default_factory=lambda: GGUF_MODULES)
    restore: Callable[[str, NDArray[Any], DecoderSpec], NDArray[Any]] = lambda name, value, spec: value

    def tensor_name(self, name: str) -> str:
        """What the file calls a tensor, by canonical name."""
        layer, rest = split_name(name)
        module, _, parameter = rest.rpartition(".")
        return f"{'' if layer is None else f'blk.{layer}.'}{self.modules[module]}.{parameter}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder family.

    `name`: transformers' `model_type`, which manifests name as well. `model_class`: what `architectures` in config.json
    names. `from_config`: config → spec. `weight_names`: canonical module → the family's own where the two differ, both
    without the layer. `gguf`: None where its GGUF files are not read. `smoothing`: one group for every linear.
    """

    name: str
    model_class: str
    from_config: Callable[[HuggingFaceConfig], DecoderSpec]
    weight_names: Mapping[str, str] = field(default_factory=dict)
    gguf: GgufFormat | None = None
    smoothing: tuple[SmoothingGroup, ...] = PRE_NORM_SMOOTHING

    def checkpoint_name(self, name: str) -> str:
        """What checkpoints and transformers call a tensor or module, without the leading `model.`."""
        return _renamed(name, self.weight_names)

    def canonical_name(self, name: str) -> str:
        """The inverse of `checkpoint_name`."""
        return _renamed(name, {theirs: ours for ours, theirs in self.weight_names.items()})


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    _, rest = split_name(name)
    for module, other in modules.items():
        if rest == module or rest.startswith(f"{module}."):
            return name.removesuffix(rest) + other + rest.removeprefix(module)
    return name
