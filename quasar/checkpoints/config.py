"""`DecoderSpec` from a Hugging Face config; what the graph cannot express is refused by name, before any work."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from quasar.checkpoints.spec import DecoderSpec, Rope
from quasar.errors import CheckpointError

Architecture = Literal["llama", "qwen2", "qwen3"]
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DEFAULT_THETA = 10000.0


def spec_from_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> DecoderSpec:
    """The spec that `config.json` and `generation_config.json` describe.

    Raises `CheckpointError` naming the architecture or option that is not supported, or the key that is missing.
    """
    try:
        spec = _spec(config, generation)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json holds a value of the wrong kind ({error})") from None
    spec.check()
    return spec


def _spec(config: Mapping[str, Any], generation: Mapping[str, Any]) -> DecoderSpec:
    architecture = _architecture(config)
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    attention_bias = bool(config.get("attention_bias", False))
    context = _size(config, "max_position_embeddings")
    rope = _rope(config, context)
    if rope.kind == "yarn":
        # max_position_embeddings may be the length before scaling; transformers does not limit a text by it.
        # Llama 3.2 says 131072 beside 32 times 8192: its factor is no length.
        context = max(context, int(rope.factor * rope.original_context_length))
    _refuse_unsupported(config, context)
    return DecoderSpec(
        architecture=architecture,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        # Qwen3's own default is 128, whatever the hidden size; the others divide.
        head_size=int(config.get("head_dim") or (128 if architecture == "qwen3" else hidden // heads)),
        vocab_size=_size(config, "vocab_size"),
        context_length=context,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        qkv_bias=architecture == "qwen2" or attention_bias,
        # Qwen2 has biases on q, k and v alone; Llama's and Qwen3's `attention_bias` covers o as well.
        output_bias=attention_bias and architecture != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)) and architecture == "llama",
        qk_norm=architecture == "qwen3",
        tied_head=bool(config.get("tie_word_embeddings", False)),
        bos_token_id=_first(config.get("bos_token_id")),
        eos_token_ids=tuple(dict.fromkeys(_ids(generation.get("eos_token_id")) + _ids(config.get("eos_token_id")))),
    )


def _architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or []
    if not names and (kind := config.get("model_type")) in ARCHITECTURES.values():
        # transformers picks the model by model_type alone.
        return next(known for known in ARCHITECTURES.values() if known == kind)
    for name in names:
        if name in ARCHITECTURES:
            # transformers picks the float model by model_type; both must mean the same.
            if config.get("model_type") != ARCHITECTURES[name]:
                raise CheckpointError(f"config.json: model_type is {config.get('model_type')!r}, but {name} is named")
            return ARCHITECTURES[name]
    came = ", ".join(map(str, names)) or f"model_type {config.get('model_type', 'unknown')!r}"
    raise CheckpointError(f"unsupported architecture: {came}; supported are {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(config: Mapping[str, Any], context: int) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"unsupported hidden_act {activation!r}: the graph has SwiGLU ('silu') alone")
    for kind in config.get("layer_types") or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"unsupported option: layer_types names {kind!r}; 'full_attention' was expected")
    if _window_applies(config, context):
        raise CheckpointError("unsupported option: sliding-window attention (use_sliding_window)")


def _window_applies(config: Mapping[str, Any], context: int) -> bool:
    """Whether some layer sees less than all that the context can hold, as transformers decides it."""
    types, used = config.get("layer_types"), bool(config.get("use_sliding_window"))
    # The defaults are those of transformers' Qwen2 and Qwen3; null is no window.
    window = config.get("sliding_window", 4096)
    if types is not None:
        # Without a window transformers cannot run such a layer.
        return "sliding_attention" in types and (not used or window is None or int(window) < context)
    # Llama has no window, whatever its config says.
    if not used or window is None or config.get("model_type") == "llama":
        return False
    return int(config.get("max_window_layers", 28)) < _size(config, "num_hidden_layers") and int(window) < context


def _rope(config: Mapping[str, Any], context: int) -> Rope:
    """Both forms of config: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before)."""
    # In transformers' order, where a config has both.
    values: dict[str, Any] = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    for name, value in values.items():
        if isinstance(value, Mapping):
            raise CheckpointError(f"unsupported option: rope parameters for some layers alone ({name})")
    kind = values.get("rope_type", values.get("type", "default"))
    theta = float(values.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA)))
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"unsupported option: partial_rotary_factor {partial} (the whole head must rotate)")
    original = int(
        config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or context
    )
    try:
        if kind == "default":
            return Rope(theta=theta)
        if kind == "linear":
            return Rope(theta=theta, kind="linear", factor=float(values["factor"]))
        if kind == "llama3":
            return Rope(
                theta=theta,
                kind="llama3",
                factor=float(values["factor"]),
                original_context_length=original,
                low_freq_factor=float(values["low_freq_factor"]),
                high_freq_factor=float(values["high_freq_factor"]),
            )
        if kind == "yarn":
            factor = float(values["factor"] or context / original)
            return Rope(
                theta=theta,
                kind="yarn",
                factor=factor,
                original_context_length=original,
                beta_fast=float(values.get("beta_fast") or 32),
                beta_slow=float(values.get("beta_slow") or 1),
                attention_factor=_attention_factor(values, factor),
                truncate=bool(values.get("truncate", True)),
            )
    except KeyError as missing:
        raise CheckpointError(f"config.json: rope scaling {kind!r} lacks {missing.args[0]!r}") from None
    raise CheckpointError(f"unsupported rope scaling {kind!r}; supported are default, linear, llama3 and yarn")


def _attention_factor(values: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin where the config says one, itself or by DeepSeek's two `mscale`s."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    first, second = values.get("mscale"), values.get("mscale_all_dim")
    if not first or not second or factor <= 1:
        return None
    return float((0.1 * first * math.log(factor) + 1) / (0.1 * second * math.log(factor) + 1))


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {key} is {value!r}; a positive integer was expected")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)


def _first(value: Any) -> int | None:
    ids = _ids(value)
    return ids[0] if ids else None
