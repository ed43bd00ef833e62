"""What the config.json and the tensor names of published draft heads mean.

Layouts: SafeAILab's EAGLE, SpecForge, AngelSlim and ModelOpt keep a Llama config with a few keys of their own;
speculators keeps it in `transformer_layer_config`. All store the same tensors under nearly the same names.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.architectures.llama import LLAMA
from quasar.checkpoints.architectures.qwen3 import QWEN3
from quasar.checkpoints.huggingface_config import SLIDING, HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec, QkNorm, Rope
from quasar.draft_heads.spec import DraftHeadSpec, FeatureNorm, HeadKind
from quasar.errors import CheckpointError

FEATURE_LAYERS = "eagle_aux_hidden_state_layer_ids"
BASE_MODEL = "base_model_name_or_path"
EAGLE, EAGLE3 = "LlamaForCausalLMEagle", "LlamaForCausalLMEagle3"
# SafeAILab names its target's class, and says by `draft_vocab_size` that a head is EAGLE-3's.
_DECODERS = {*(family.model_class for family in ARCHITECTURES.values()), "MixtralForCausalLM"}
_KINDS: Mapping[str, HeadKind] = {
    EAGLE: "eagle",
    "EagleLlamaForCausalLM": "eagle",
    EAGLE3: "eagle3",
    "Eagle3LlamaForCausalLM": "eagle3",
}
_SPECULATORS = "speculators_model_type"
# What makes another kind of head of it, by option: the values that do not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "medusa_num_heads": (None,),
    "hydra_num_heads": (None,),
    "kv_lora_rank": (None,),
    "dflash_config": (None,),
    "parallel_drafting": (None, False),
    "ptd_token_id": (None,),
    "add_para_norm": (None, False),
    "early_stop_method": (None,),
    "logit_scale": (None, 1),
    "quantization_config": (None,),
}
_PLAIN_EAGLE_CONFIG: Mapping[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (None, True),
    "use_input_layernorm_in_first_layer": (None, True),
    "use_last_layernorm": (None, True),
    "use_mtp_layernorm": (None, False),
    "eh_proj_before_attn": (None, False),
    "parallel_draft_step": (None, 0, 1),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def canonical_name(stored: str) -> str | None:
    """A stored tensor's canonical name; None for what follows from the config, or is the target's."""
    name = stored.removeprefix("model.")
    if name.startswith("verifier_") or "rotary_emb." in name:
        return None
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name


def base_model(config: Mapping[str, Any]) -> str:
    """The model that a config says a head was trained for; "" if it does not."""
    verifier = _object(_object(config, "speculators_config"), "verifier")
    return str(verifier.get("name_or_path") or config.get(BASE_MODEL) or "")


def draft_head_spec(
    config: Mapping[str, Any], stored: Collection[str], *, num_layers: int, context_length: int
) -> DraftHeadSpec:
    """The spec of a head from its config and the canonical names of its tensors.

    `num_layers`, `context_length`: the target's. Biases and norms of queries and keys are read off the names: trainers
    copy the target's options into a head that has neither. Raises `CheckpointError` naming the option that is not
    supported, or the key that is missing.
    """
    try:
        return _spec(config, stored, num_layers, context_length)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json holds a value of the wrong kind ({error})") from None


def _spec(config: Mapping[str, Any], stored: Collection[str], num_layers: int, context_length: int) -> DraftHeadSpec:
    kind = _kind(config)
    inner = config.get("transformer_layer_config") if _SPECULATORS in config else config
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"config.json: transformer_layer_config is {inner!r}; a JSON object was expected")
    eagle = _object(config, "eagle_config")
    for values, plain in ((config, _PLAIN), (inner, _PLAIN), (eagle, _PLAIN_EAGLE_CONFIG)):
        for option, allowed in plain.items():
            if values.get(option) not in allowed:
                raise CheckpointError(f"unsupported option: {option} {values[option]!r} in a draft head")
    _refuse_experts(inner, stored)
    layer = HuggingFaceConfig(inner, {}).with_defaults({"max_position_embeddings": 2048})
    if layer.num_layers != 1:
        raise CheckpointError(
            f"unsupported option: num_hidden_layers {layer.num_layers}; a draft head of one was expected"
        )
    decoder = _decoder(layer, stored, context_length, is_speculators=_SPECULATORS in config)
    own_head = "lm_head.weight" in stored
    spec = DraftHeadSpec(
        kind=kind,
        decoder=decoder,
        feature_layers=(num_layers,),
        target_hidden_size=_size(config, "target_hidden_size", decoder.hidden_size),
        draft_vocab_size=_size(config, "draft_vocab_size", decoder.vocab_size),
        own_embedding="embed_tokens.weight" in stored,
        own_head=own_head,
    )
    if kind == "eagle":
        said = config.get("bias")
        return replace(spec, normed=True, fuse_bias="fc.bias" in stored if said is None else bool(said))
    # sglang's head is the embedding then, other engines' the target's.
    if not own_head and layer.flag("tie_word_embeddings"):
        raise CheckpointError("unsupported option: tie_word_embeddings True in a draft head without an LM head")
    return replace(
        spec,
        feature_layers=_feature_layers(config, eagle, num_layers),
        # A smaller LM head can only be its own.
        own_head=own_head or spec.reduces_vocabulary,
        fuse_bias="fc.bias" in stored,
        feature_norm=_feature_norm(config, eagle),
        norm_before_residual=_norm_before_residual(config),
        norm_output=bool(config.get("norm_output") or eagle.get("return_hidden_post_norm")),
    )


def _kind(config: Mapping[str, Any]) -> HeadKind:
    if _SPECULATORS in config:
        if (came := config[_SPECULATORS]) != "eagle3":
            raise CheckpointError(f"unsupported draft head: {_SPECULATORS} {came!r}; 'eagle3' was expected")
        return "eagle3"
    names = config.get("architectures") or []
    kinds = [_KINDS[name] for name in names if name in _KINDS]
    if kinds:
        return kinds[0]
    if names and not set(names).intersection(_DECODERS):
        supported = f"{', '.join(_KINDS)}, and the class of a decoder"
        raise CheckpointError(f"unsupported draft head: {', '.join(map(str, names))}; supported are {supported}")
    return "eagle" if config.get("draft_vocab_size") is None else "eagle3"


def _refuse_experts(config: Mapping[str, Any], stored: Collection[str]) -> None:
    """Configs have such options from their targets: the tensors tell."""
    experts = next((name for name in sorted(stored) if ".experts." in name), None)
    if experts is not None:
        said = "".join(f" {option} {config[option]!r}," for option in _EXPERTS if config.get(option))
        raise CheckpointError(f"unsupported option:{said} experts in a draft head ({experts})")


def _decoder(
    config: HuggingFaceConfig, stored: Collection[str], context_length: int, *, is_speculators: bool
) -> DecoderSpec:
    model_type = config.value("model_type")
    if is_speculators and model_type not in (LLAMA.name, QWEN3.name):
        raise CheckpointError(f"unsupported option: model_type {model_type!r} of a draft head's layer")
    # Speculators makes the layer of its config by transformers; the other trainers leave these options unread.
    said_bias = is_speculators and config.flag("attention_bias")
    has_qk_norm = "layers.0.self_attn.q_norm.weight" in stored or (is_speculators and model_type == QWEN3.name)
    qk_norm: QkNorm | None = "head" if has_qk_norm else None
    at = "layers.0.self_attn"
    layer = LayerSpec(
        attention=config.attention(
            head_size=128 if is_speculators and model_type == QWEN3.name else None,
            rope=_rope(config, context_length, is_speculators=is_speculators),
            qkv_bias=said_bias or f"{at}.q_proj.bias" in stored,
            output_bias=said_bias or f"{at}.o_proj.bias" in stored,
            qk_norm=qk_norm,
            window=_window(config),
        ),
        mlp=config.mlp(bias=(is_speculators and config.flag("mlp_bias")) or "layers.0.mlp.gate_proj.bias" in stored),
    )
    return replace(
        config.decoder(LLAMA.name, [layer]),
        # Configs say how long the training text was.
        context_length=context_length,
        tied_head=False,
        bos_token_id=None,
        eos_token_ids=(),
    )


def _rope(config: HuggingFaceConfig, context_length: int, *, is_speculators: bool) -> Rope:
    values = config.rope_values
    for option in ("mrope_section", "mrope_interleaved", "alpha"):
        if values.get(option):
            raise CheckpointError(f"unsupported option: {option} {values[option]!r} in a draft head's rope scaling")
    longest = config.size("max_position_embeddings")
    if values.get("rope_type", values.get("type")) == "dynamic" and longest < context_length:
        raise CheckpointError(
            f"unsupported option: rope scaling 'dynamic' from {longest} positions on; the model has {context_length}"
        )
    return config.partial_rope if is_speculators else config.rope


def _window(config: HuggingFaceConfig) -> int | None:
    if config.layer_types()[0] != SLIDING:
        return None
    return config.size("sliding_window")


def _feature_layers(config: Mapping[str, Any], eagle: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Which layers' inputs the head reads: by default those of three layers, low, in the middle and high."""
    # As vLLM counts: 0 is the embedding.
    entered = _layers(config.get(FEATURE_LAYERS))
    # As SpecForge, ModelOpt and sglang count: what layer 0 makes enters layer 1.
    left = tuple(layer + 1 for layer in _layers(eagle.get(FEATURE_LAYERS)))
    if entered and left and entered != left:
        raise CheckpointError(
            f"config.json: {FEATURE_LAYERS} is {list(entered)}, the layers that are entered, and "
            f"{eagle[FEATURE_LAYERS]} in eagle_config, the layers that are left: they contradict each other"
        )
    return entered or left or (2, num_layers // 2, num_layers - 3)


def _layers(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or any(type(layer) is not int for layer in value):
        raise CheckpointError(f"config.json: {FEATURE_LAYERS} is {value!r}; numbers of layers were expected")
    return tuple(value)


def _feature_norm(config: Mapping[str, Any], eagle: Mapping[str, Any]) -> FeatureNorm | None:
    # `use_aux_norm`: what TorchSpec called it first.
    each = bool(config.get("fc_norm") or config.get("use_aux_norm"))
    if not (config.get("norm_before_fc") or eagle.get("norm_before_fc")):
        return "each" if each else None
    if each:
        raise CheckpointError("unsupported option: norm_before_fc True beside fc_norm True")
    return "all"


def _norm_before_residual(config: Mapping[str, Any]) -> bool:
    value = config.get("norm_before_residual")
    if value is None and _SPECULATORS in config:
        # Speculators' own default is false, vLLM's true.
        raise CheckpointError("config.json: norm_before_residual is missing; true or false was expected")
    return bool(value)


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} is {value!r}; a JSON object was expected")
    return value


def _size(config: Mapping[str, Any], key: str, default: int) -> int:
    return default if config.get(key) is None else HuggingFaceConfig(config, {}).size(key)
