"""What `config.json` says, in the terms of a spec; the defaults are transformers'.

A family's `from_config` puts a `DecoderSpec` together from these parts (`architectures`).
"""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, QkNorm, Rope
from quasar.errors import CheckpointError

_DEFAULT_THETA = 10000.0


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
        if self.rope.kind == "yarn":
            # max_position_embeddings may be the length before scaling; transformers does not limit a sequence by it.
            # Llama 3.2 says 131072 beside 32 times 8192: its factor is no length.
            context = max(context, int(self.rope.factor * self.rope.original_context_length))
        return context

    @cached_property
    def rope(self) -> Rope:
        """Both forms of config: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before)."""
        context = self.size("max_position_embeddings")
        # In transformers' order, where a config has both.
        values: dict[str, Any] = dict(self.value("rope_scaling") or self.value("rope_parameters") or {})
        for name, value in values.items():
            if isinstance(value, Mapping):
                raise CheckpointError(f"unsupported option: rope parameters for some layers alone ({name})")
        kind = values.get("rope_type", values.get("type", "default"))
        theta = float(values.get("rope_theta", self.value("rope_theta", _DEFAULT_THETA)))
        partial = values.get("partial_rotary_factor", self.value("partial_rotary_factor", 1.0))
        if partial not in (None, 1, 1.0):
            raise CheckpointError(f"unsupported option: partial_rotary_factor {partial} (the whole head must rotate)")
        original = int(
            self.value("original_max_position_embeddings") or values.get("original_max_position_embeddings") or context
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

    def attention(
        self,
        *,
        head_size: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: QkNorm | None = None,
        window: int | None = None,
    ) -> AttentionSpec:
        """A layer's attention. `head_size`: where the config has no `head_dim`; else heads divide the hidden size."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        return AttentionSpec(
            num_heads=heads,
            num_kv_heads=int(self.value("num_key_value_heads") or heads),
            head_size=int(self.value("head_dim") or head_size or hidden // heads),
            rope=self.rope,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm=qk_norm,
            window=window,
        )

    def mlp(self, *, bias: bool = False) -> MlpSpec:
        """A layer's MLP."""
        activation = self.value("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise CheckpointError(f"unsupported hidden_act {activation!r}: the graph has SwiGLU ('silu') alone")
        return MlpSpec(intermediate_size=self.size("intermediate_size"), bias=bias)

    def windows(self) -> tuple[int | None, ...]:
        """By layer, the window that `layer_types` gives it."""
        kinds = list(self.value("layer_types") or ())
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise CheckpointError(f"unsupported option: layer_types names {kind!r}; 'full_attention' was expected")
        return tuple(
            self.window() if kinds[layer : layer + 1] == ["sliding_attention"] else None
            for layer in range(self.num_layers)
        )

    def window(self) -> int | None:
        """The window of the layers that have one; None if it holds the whole context, and 0 where none is given."""
        # The default is that of transformers' Qwen2 and Qwen3.
        window = self.value("sliding_window", 4096)
        if window is None or not self.flag("use_sliding_window"):
            # transformers cannot run such a layer.
            return 0
        return int(window) if int(window) < self.context else None

    def decoder(self, architecture: str, layers: Iterable[LayerSpec]) -> DecoderSpec:
        """The whole model. `architecture`: the family's name."""
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
