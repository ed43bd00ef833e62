"""What `config.json` says, in the terms of a spec; the defaults are transformers'.

A family's `from_config` puts a `DecoderSpec` together from these parts (`architectures`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpKind, MlpSpec, QkNorm, Rope
from quasar.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"
_DEFAULT_THETA = 10000.0
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_MLPS: Mapping[str, MlpKind] = {
    "silu": "gated_silu",
    "swish": "gated_silu",
    "gelu_pytorch_tanh": "gated_gelu_tanh",
}


class HuggingFaceConfig:
    """A model's `config.json` and `generation_config.json`.

    Every method raises `CheckpointError` naming an option that is not supported or a size that is missing; values of a
    wrong kind raise `TypeError`, `ValueError` or `AttributeError`.
    """

    def __init__(self, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        self._config = config
        self._generation = generation

    def value(self, key: str, default: Any = None) -> Any:
        """What the config says, as it stands there."""
        return self._config.get(key, default)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "HuggingFaceConfig":
        """The config with a family's own values for what it leaves out; null is a value."""
        return HuggingFaceConfig({**defaults, **self._config}, self._generation)

    def with_values(self, values: Mapping[str, Any]) -> "HuggingFaceConfig":
        """The config with other values in place of its own."""
        return HuggingFaceConfig({**self._config, **values}, self._generation)

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raise `CheckpointError` if an option has another value than the allowed ones; what is left out is allowed."""
        if key in self._config and self._config[key] not in allowed:
            raise CheckpointError(f"unsupported option: {key} {self._config[key]!r}")

    def flag(self, key: str) -> bool:
        """Whether an option is switched on."""
        return bool(self.value(key, False))

    def size(self, key: str) -> int:
        """A positive integer that must be there."""
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"config.json: {key} is {value!r}; a positive integer was expected")
        return value

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.size("num_hidden_layers")

    @cached_property
    def context(self) -> int:
        """Positions that the model can tell apart."""
        context = self.size("max_position_embeddings")
        values = self.rope_values
        if _kind(values) == "yarn":
            # max_position_embeddings may be the length before scaling; transformers does not limit a sequence by it.
            # Llama 3.2 says 131072 beside 32 times 8192: its factor is no length.
            rope = self.rope_from(values)
            context = max(context, int(rope.factor * rope.original_context_length))
        return context

    @property
    def rope_values(self) -> dict[str, Any]:
        """What the config says of rotation: `rope_scaling`, or `rope_parameters` (transformers 5)."""
        # In transformers' order, where a config has both.
        return dict(self.value("rope_scaling") or self.value("rope_parameters") or {})

    @property
    def head_size(self) -> int:
        """Values per head: `head_dim`, or else heads divide the hidden size."""
        return int(self.value("head_dim") or self.size("hidden_size") // self.size("num_attention_heads"))

    @cached_property
    def rope(self) -> Rope:
        """The rope of every layer, over the whole head."""
        values = self.rope_values
        partial = values.get("partial_rotary_factor", self.value("partial_rotary_factor", 1.0))
        if partial not in (None, 1, 1.0):
            raise CheckpointError(f"unsupported option: partial_rotary_factor {partial} (the whole head must rotate)")
        return self.rope_from(values)

    @cached_property
    def partial_rope(self) -> Rope:
        """The rope of every layer, over the share of a head that `partial_rotary_factor` says."""
        values = self.rope_values
        partial = values.get("partial_rotary_factor", self.value("partial_rotary_factor"))
        size = self.head_size if partial is None else int(self.head_size * float(partial))
        return replace(self.rope_from(values), rotary_size=0 if size == self.head_size else size)

    def rope_from(self, values: Mapping[str, Any]) -> Rope:
        """A rope from `rope_parameters`, or from `rope_scaling` beside the config's own `rope_theta`."""
        context = self.size("max_position_embeddings")
        for name, value in values.items():
            if isinstance(value, Mapping):
                raise CheckpointError(f"unsupported option: rope parameters for some layers alone ({name})")
        kind = _kind(values)
        theta = float(values.get("rope_theta", self.value("rope_theta", _DEFAULT_THETA)))
        original = int(
            self.value("original_max_position_embeddings") or values.get("original_max_position_embeddings") or context
        )
        try:
            # Dynamic scaling begins after max_position_embeddings, which is the longest sequence of an engine.
            if kind in ("default", "dynamic"):
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
            if kind == "longrope":
                return Rope(
                    theta=theta,
                    kind="divided",
                    divisors=tuple(map(float, values["short_factor"])),
                    long_divisors=tuple(map(float, values["long_factor"])),
                    original_context_length=original,
                    attention_factor=longrope_factor(
                        values.get("attention_factor"), float(values.get("factor") or context / original), original
                    ),
                )
        except KeyError as missing:
            raise CheckpointError(f"config.json: rope scaling {kind!r} lacks {missing.args[0]!r}") from None
        raise CheckpointError(f"unsupported rope scaling {kind!r}; supported are {', '.join(_ROPES)}")

    def attention(
        self,
        *,
        head_size: int | None = None,
        rope: Rope | Literal["config"] | None = "config",
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: QkNorm | None = None,
        window: int | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
    ) -> AttentionSpec:
        """A layer's attention.

        `head_size`: where the config has no `head_dim`; else heads divide the hidden size. `rope`: "config" is the one
        of every layer.
        """
        heads = self.size("num_attention_heads")
        return AttentionSpec(
            num_heads=heads,
            num_kv_heads=int(self.value("num_key_value_heads") or heads),
            head_size=int(self.value("head_dim") or head_size or self.head_size),
            rope=self.rope if rope == "config" else rope,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm=qk_norm,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )

    def mlp(self, *, bias: bool = False, activation: str = "hidden_act") -> MlpSpec:
        """A layer's MLP. `activation`: the option that names its activation; SiLU where that is left out."""
        name = self.value(activation, "silu")
        kind = _MLPS.get(name)
        if kind is None:
            raise CheckpointError(f"unsupported {activation} {name!r}; supported are {', '.join(_MLPS)}")
        return MlpSpec(intermediate_size=self.size("intermediate_size"), kind=kind, bias=bias)

    def layer_types(self) -> tuple[str, ...]:
        """By layer, `layer_types`; full attention where the config has none."""
        kinds = list(self.value("layer_types") or ())
        for kind in kinds:
            if kind not in (FULL, SLIDING):
                raise CheckpointError(f"unsupported option: layer_types names {kind!r}; {FULL!r} was expected")
        return tuple(kinds[layer] if layer < len(kinds) else FULL for layer in range(self.num_layers))

    def windows(self) -> tuple[int | None, ...]:
        """By layer, the window that `layer_types` gives it, for families that have `use_sliding_window`."""
        return tuple(self.window() if kind == SLIDING else None for kind in self.layer_types())

    def window(self) -> int | None:
        """The window of the layers that have one, for families that have `use_sliding_window`; 0 where none is given.

        None if it holds the whole context.
        """
        # The default is that of transformers' Qwen2 and Qwen3.
        window = self.value("sliding_window", 4096)
        if window is None or not self.flag("use_sliding_window"):
            # transformers cannot run such a layer.
            return 0
        return self.fitting_window(window)

    def fitting_window(self, window: int | None) -> int | None:
        """A window; None if it holds the whole context, or where there is none."""
        return None if window is None or int(window) >= self.context else int(window)

    def refuse_windows(self) -> None:
        """Raise `CheckpointError` if a layer has a window: for families whose model in transformers has none."""
        if SLIDING in self.layer_types():
            raise CheckpointError("unsupported option: sliding-window attention (layer_types), which the family lacks")

    def decoder(self, architecture: str, layers: Iterable[LayerSpec]) -> DecoderSpec:
        """The whole model. `architecture`: the family's name. Scales and soft caps are the family's to add."""
        eos = (*_ids(self._generation.get("eos_token_id")), *_ids(self.value("eos_token_id")))
        return DecoderSpec(
            architecture=architecture,
            layers=tuple(layers),
            hidden_size=self.size("hidden_size"),
            vocab_size=self.size("vocab_size"),
            context_length=self.context,
            rms_norm_eps=float(self.value("rms_norm_eps", 1e-6)),
            tied_head=self.flag("tie_word_embeddings"),
            bos_token_id=next(iter(_ids(self.value("bos_token_id"))), None),
            eos_token_ids=tuple(dict.fromkeys(eos)),
        )


def longrope_factor(said: Any, factor: float, original: int) -> float:
    """LongRoPE's factor on cos and sin: what a config says, or that of the paper (arXiv 2402.13753)."""
    if said is not None:
        return float(said)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _kind(values: Mapping[str, Any]) -> Any:
    kind = values.get("rope_type", values.get("type", "default"))
    return "longrope" if kind == "su" else kind


def _attention_factor(values: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin where the config says one, itself or by DeepSeek's two `mscale`s."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    first, second = values.get("mscale"), values.get("mscale_all_dim")
    if not first or not second or factor <= 1:
        return None
    return float((0.1 * first * math.log(factor) + 1) / (0.1 * second * math.log(factor) + 1))


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)
