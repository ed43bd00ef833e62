"""What a GGUF header says, in the terms of a spec.

A family's `GgufFormat.from_header` puts a `DecoderSpec` together from these parts (`architectures`).
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quasar.checkpoints.checkpoint_text import END_TOKEN_NAMES, end_ids
from quasar.checkpoints.gguf_tokenizer import GgufVocabulary
from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, QkNorm, Rope
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

    def attention(self, *, qk_norm: QkNorm | None = None) -> AttentionSpec:
        """Every layer's attention; a bias is there if the first block has it."""
        hidden, heads = int(self.value("embedding_length")), int(self.value("attention.head_count"))
        head_size = int(self.value("attention.key_length", hidden // heads))
        rotated = int(self.value("rope.dimension_count", head_size))
        if rotated != head_size:
            raise CheckpointError(f"{self._path}: unsupported option: {rotated} of {head_size} head channels rotate")
        return AttentionSpec(
            num_heads=heads,
            num_kv_heads=int(self.value("attention.head_count_kv", heads)),
            head_size=head_size,
            rope=self._rope(),
            qkv_bias="blk.0.attn_q.bias" in self.tensors,
            output_bias="blk.0.attn_output.bias" in self.tensors,
            qk_norm=qk_norm,
        )

    def mlp(self) -> MlpSpec:
        """Every layer's MLP; a bias is there if the first block has it."""
        if self.value("expert_count", 0):
            raise CheckpointError(f"{self._path}: unsupported option: mixture of experts (expert_count)")
        return MlpSpec(
            intermediate_size=int(self.value("feed_forward_length")), bias="blk.0.ffn_up.bias" in self.tensors
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

    def _rope(self) -> Rope:
        theta = _shortest(self.value("rope.freq_base", 10000.0))
        if "rope_freqs.weight" in self.tensors:
            divisors = np.asarray(self.tensors["rope_freqs.weight"].data, np.float32)
            return Rope(theta=theta, kind="divided", divisors=tuple(divisors.tolist()))
        kind = self.value("rope.scaling.type", "none")
        factor = _shortest(self.value("rope.scaling.factor", 1.0))
        if kind == "none":
            return Rope(theta=theta)
        if kind == "linear":
            return Rope(theta=theta, kind="linear", factor=factor)
        if kind == "yarn":
            original = int(self.value("rope.scaling.original_context_length"))
            return Rope(theta=theta, kind="yarn", factor=factor, original_context_length=original)
        raise CheckpointError(f"{self._path}: unsupported rope scaling {kind!r}; supported are linear and yarn")


def _shortest(value: Any) -> float:
    return float(str(np.float32(value)))
