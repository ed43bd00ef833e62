"""What a GGUF header says, in the terms of a spec.

A family's `GgufFormat.from_header` puts a `DecoderSpec` together from these parts (`architectures`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quasar.checkpoints.checkpoint_text import END_TOKEN_NAMES, end_ids
from quasar.checkpoints.gguf_tokenizer import GgufVocabulary
from quasar.checkpoints.huggingface_config import longrope_factor
from quasar.checkpoints.rope import attention_scaling
from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpKind, MlpSpec, QkNorm, Rope
from quasar.errors import CheckpointError

_END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class GgufHeader:
    """Fields and tensor entries of a GGUF file, of all its parts where it is split.

    Every method raises `CheckpointError` naming an option that is not supported or a key that is missing; values of a
    wrong kind raise `TypeError` or `ValueError`.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = fields
        self.tensors = tensors

    def field(self, key: str, *default: Any) -> Any:
        """A field's value, or the default if there is one."""
        field = self._fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise CheckpointError(f"{self._path}: the GGUF header lacks {key!r}")

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family, which the keys of its sizes start with."""
        return str(self.field("general.architecture"))

    def value(self, key: str, *default: Any) -> Any:
        """A field of the family: "block_count" is llama.block_count in a Llama's file."""
        return self.field(f"{self.architecture}.{key}", *default)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, by llama.cpp's name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self._path}: the tensor {name!r} is missing")
        # GGUF lists the fastest axis first.
        return tuple(int(extent) for extent in reversed(self.tensors[name].shape))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.value("block_count"))

    @property
    def head_size(self) -> int:
        """Values per head."""
        heads = int(self.value("attention.head_count"))
        return int(self.value("attention.key_length", int(self.value("embedding_length")) // heads))

    def attention(
        self,
        *,
        rope: Rope | Literal["header"] | None = "header",
        qk_norm: QkNorm | None = None,
        window: int | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
    ) -> AttentionSpec:
        """A layer's attention; a bias is there if the first block has it. `rope`: "header": every layer's."""
        heads = int(self.value("attention.head_count"))
        return AttentionSpec(
            num_heads=heads,
            num_kv_heads=int(self.value("attention.head_count_kv", heads)),
            head_size=self.head_size,
            rope=self.rope() if rope == "header" else rope,
            qkv_bias="blk.0.attn_q.bias" in self.tensors,
            output_bias="blk.0.attn_output.bias" in self.tensors,
            qk_norm=qk_norm,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )

    def window(self) -> int | None:
        """The window of the layers that have one; None if it holds the whole context, or where there is none."""
        window = int(self.value("attention.sliding_window", 0))
        return window if 0 < window < int(self.value("context_length")) else None

    def factor(self, key: str, default: float) -> float:
        """A float of the family, as the config said it."""
        return _shortest(self.value(key, default))

    def mlp(self, *, kind: MlpKind = "gated_silu") -> MlpSpec:
        """Every layer's MLP; a bias is there if the first block has it."""
        if experts := self.value("expert_count", 0):
            raise CheckpointError(
                f"{self._path}: unsupported option: mixture of experts ({self.architecture}.expert_count is {experts})"
            )
        return MlpSpec(
            intermediate_size=int(self.value("feed_forward_length")),
            kind=kind,
            bias="blk.0.ffn_up.bias" in self.tensors,
        )

    def decoder(self, architecture: str, layers: Iterable[LayerSpec]) -> DecoderSpec:
        """The whole model. `architecture`: the family's name."""
        return DecoderSpec(
            architecture=architecture,
            layers=tuple(layers),
            hidden_size=int(self.value("embedding_length")),
            vocab_size=int(self.tensor_shape("token_embd.weight")[0]),
            context_length=int(self.value("context_length")),
            # The header holds float32; its shortest decimal is what the config said (1e-5, not 9.99…e-6).
            rms_norm_eps=_shortest(self.value("attention.layer_norm_rms_epsilon")),
            tied_head="output.weight" not in self.tensors,
            bos_token_id=self.vocabulary.bos_id,
            eos_token_ids=tuple(self.end_ids()),
        )

    @cached_property
    def vocabulary(self) -> GgufVocabulary:
        """What the header says of the tokenizer."""
        return GgufVocabulary.read(self.field)

    def end_ids(self) -> dict[int, tuple[str, ...]]:
        """Token id → what names it as the end of a sequence."""
        vocabulary = self.vocabulary
        fields = [
            (key, value)
            for key in _END_FIELDS
            # An id past the vocabulary is how converters write "none".
            if (value := self.field(f"tokenizer.ggml.{key}", None)) is not None and value < len(vocabulary.tokens)
        ]
        names = [
            (f"the name {text}", token)
            for token, text in enumerate(vocabulary.tokens)
            if text in END_TOKEN_NAMES and vocabulary.is_control(token)
        ]
        return end_ids((*fields, *names))

    def rope(self, *, theta: float | None = None, partial: bool = False) -> Rope:
        """The rope of every layer, or of those that have another theta. `partial`: a share of the head may rotate."""
        head_size = self.head_size
        rotated = int(self.value("rope.dimension_count", head_size))
        if rotated != head_size and not partial:
            raise CheckpointError(f"{self._path}: unsupported option: {rotated} of {head_size} head channels rotate")
        size = 0 if rotated == head_size else rotated
        if theta is not None:
            return Rope(theta=theta, rotary_size=size)
        theta = self.factor("rope.freq_base", 10000.0)
        if "rope_freqs.weight" in self.tensors:
            return Rope(theta=theta, kind="divided", rotary_size=size, divisors=self._divisors("rope_freqs.weight"))
        if "rope_factors_short.weight" in self.tensors:
            context = int(self.value("context_length"))
            original = int(self.value("rope.scaling.original_context_length", context))
            return Rope(
                theta=theta,
                kind="divided",
                rotary_size=size,
                divisors=self._divisors("rope_factors_short.weight"),
                long_divisors=self._divisors("rope_factors_long.weight"),
                original_context_length=original,
                attention_factor=longrope_factor(
                    self.value("rope.scaling.attn_factor", None), context / original, original
                ),
            )
        # llama.cpp's defaults: a factor without a type is linear, and 0 is none.
        kind = self.value("rope.scaling.type", "linear")
        factor = self.factor("rope.scaling.factor", self.value("rope.scale_linear", 1.0)) or 1.0
        if kind == "yarn":
            return self._yarn(theta, factor, size)
        if kind not in ("none", "linear"):
            raise CheckpointError(f"{self._path}: unsupported rope scaling {kind!r}; supported are linear and yarn")
        self._expect("rope.scaling.attn_factor", 1.0)
        if kind == "none" or factor == 1:
            return Rope(theta=theta, rotary_size=size)
        return Rope(theta=theta, kind="linear", factor=factor, rotary_size=size)

    def _yarn(self, theta: float, factor: float, rotary_size: int) -> Rope:
        # Versions of llama.cpp differ in what these do to the factor on cos and sin, and in which families read them.
        self._expect("rope.scaling.yarn_log_multiplier", 0.0)
        self._expect("rope.scaling.yarn_attn_factor", 1.0)
        # Less than 0 is how llama.cpp says that nothing is said.
        self._expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)
        rope = Rope(
            theta=theta,
            kind="yarn",
            rotary_size=rotary_size,
            factor=factor,
            original_context_length=int(self.value("rope.scaling.original_context_length")),
            beta_fast=self.factor("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self.factor("rope.scaling.yarn_beta_slow", 1.0),
        )
        # In llama.cpp a factor on the paper's.
        extra = self.factor("rope.scaling.attn_factor", 1.0)
        return rope if extra == 1 else replace(rope, attention_factor=extra * attention_scaling(rope))

    def _expect(self, key: str, *values: float) -> None:
        """Raise `CheckpointError` if a float of the family is none of these, the first of which is the default."""
        found = self.factor(key, values[0])
        if found not in values:
            raise CheckpointError(
                f"{self._path}: unsupported option: {self.architecture}.{key} is {found:g}; {values[0]:g} was expected"
            )

    def _divisors(self, name: str) -> tuple[float, ...]:
        self.tensor_shape(name)
        return tuple(np.asarray(self.tensors[name].data, np.float32).tolist())


def _shortest(value: Any) -> float:
    return float(str(np.float32(value)))
