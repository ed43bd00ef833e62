"""A GGUF file: spec from its header, weights dequantized block by block to float32.

llama.cpp stores Llama's q and k rows pairwise interleaved; they are put back into the order of the two halves.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.checkpoint_text import (
    END_TOKEN_NAMES,
    CheckpointText,
    chat_templates,
    end_ids,
    sampling_defaults,
)
from quasar.checkpoints.gguf_parts import check_parts, gguf_parts, open_gguf
from quasar.checkpoints.gguf_tokenizer import GgufVocabulary, tokenizer_from_gguf
from quasar.checkpoints.spec import DecoderSpec, Rope
from quasar.errors import CheckpointError

_Architecture = Literal["llama", "qwen2", "qwen3"]
_ARCHITECTURES: tuple[_Architecture, ...] = ("llama", "qwen2", "qwen3")
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_GLOBAL_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class GgufFile:
    """Weights of one GGUF file, or of all parts of a split one, by canonical name."""

    def __init__(self, path: Path) -> None:
        self._parts = gguf_parts(path)
        self._path = path = self._parts[0]
        readers = [open_gguf(part) for part in self._parts]
        check_parts(self._parts, readers)
        self._reader = readers[0]
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        try:
            self.spec: DecoderSpec = self._read_spec()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the header holds a value of the wrong kind ({error})") from None
        self.spec.check()
        self._check_tensors()

    @property
    def location(self) -> Path:
        """The file, or the first of its parts."""
        return self._path

    @property
    def files(self) -> tuple[Path, ...]:
        """The file or its parts: they hold config, tokenizer and weights."""
        return self._parts

    def read(self, name: str) -> NDArray[Any]:
        """One tensor by canonical name: float16 where stored so, else float32."""
        from gguf import GGMLQuantizationType, dequantize

        tensor = self._tensors[_gguf_name(name)]
        if tensor.tensor_type in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
            value = np.array(tensor.data)
        else:
            value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if self.spec.architecture == "llama":
            if ".q_proj." in name:
                value = _halves_from_pairs(value, self.spec.num_heads)
            elif ".k_proj." in name:
                value = _halves_from_pairs(value, self.spec.num_kv_heads)
        return value

    def transformers_config(self) -> Any:
        """A transformers config made from the header."""
        from transformers import LlamaConfig, Qwen2Config, Qwen3Config

        spec = self.spec
        common: dict[str, Any] = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "max_position_embeddings": spec.context_length,
            "rms_norm_eps": spec.rms_norm_eps,
            "rope_parameters": self._transformers_rope(),
            "tie_word_embeddings": spec.tied_head,
            "bos_token_id": spec.bos_token_id,
            "eos_token_id": list(spec.eos_token_ids) or None,
        }
        if spec.architecture == "llama":
            return LlamaConfig(head_dim=spec.head_size, attention_bias=spec.qkv_bias, mlp_bias=spec.mlp_bias, **common)
        if spec.architecture == "qwen2":
            return Qwen2Config(**common)
        return Qwen3Config(head_dim=spec.head_size, attention_bias=spec.qkv_bias, **common)

    def text(self) -> CheckpointText:
        """The tokenizer that the header describes, its chat templates, end tokens and sampling defaults.

        Raises `CheckpointError` naming a tokenizer or pre-tokenizer that is not supported.
        """
        vocabulary = self._vocabulary
        try:
            tokenizer = tokenizer_from_gguf(vocabulary)
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from None
        named = {name: self._field(f"tokenizer.chat_template.{name}", "") for name in self._template_names()}
        draws = self._field("general.sampling.temp", None) is not None
        return CheckpointText(
            tokenizer=tokenizer,
            chat_templates=chat_templates({"default": self._field("tokenizer.chat_template", ""), **named}),
            bos_token="" if vocabulary.bos_id is None else vocabulary.tokens[vocabulary.bos_id],
            eos_token="" if vocabulary.eos_id is None else vocabulary.tokens[vocabulary.eos_id],
            end_ids=self._end_ids(),
            sampling=sampling_defaults(
                {name: self._field(f"general.sampling.{key}", None) for name, key in _SAMPLING.items()}, draws=draws
            ),
        )

    def _template_names(self) -> list[str]:
        return [str(name) for name in self._field("tokenizer.chat_templates", [])]

    @cached_property
    def _vocabulary(self) -> GgufVocabulary:
        return GgufVocabulary.read(self._field)

    def _end_ids(self) -> dict[int, tuple[str, ...]]:
        vocabulary = self._vocabulary
        fields = [
            (key, value)
            for key in _END_FIELDS
            # An id past the vocabulary is how converters write "none".
            if (value := self._field(f"tokenizer.ggml.{key}", None)) is not None and value < len(vocabulary.tokens)
        ]
        names = [
            (f"the name {text}", token)
            for token, text in enumerate(vocabulary.tokens)
            if text in END_TOKEN_NAMES and vocabulary.is_control(token)
        ]
        return end_ids((*fields, *names))

    def _transformers_rope(self) -> dict[str, Any]:
        rope = self.spec.rope
        values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
        if rope.kind in ("default", "divided"):
            # Divided frequencies have no transformers form; whoever loads the float model sets them.
            return {"rope_type": "default", "rope_theta": rope.theta}
        values["factor"] = rope.factor
        if rope.kind == "yarn":
            values["original_max_position_embeddings"] = rope.original_context_length
        return values

    @cached_property
    def _architecture(self) -> _Architecture:
        name = self._field("general.architecture")
        for known in _ARCHITECTURES:
            if name == known:
                return known
        raise CheckpointError(
            f"unsupported architecture: GGUF {name!r} in {self._path}; supported are {', '.join(_ARCHITECTURES)}"
        )

    def _read_spec(self) -> DecoderSpec:
        architecture = self._architecture
        if self._field(f"{architecture}.expert_count", 0):
            raise CheckpointError(f"{self._path}: unsupported option: mixture of experts (expert_count)")
        hidden = int(self._field(f"{architecture}.embedding_length"))
        heads = int(self._field(f"{architecture}.attention.head_count"))
        head_size = int(self._field(f"{architecture}.attention.key_length", hidden // heads))
        rotated = int(self._field(f"{architecture}.rope.dimension_count", head_size))
        if rotated != head_size:
            raise CheckpointError(f"{self._path}: unsupported option: {rotated} of {head_size} head channels rotate")
        return DecoderSpec(
            architecture=architecture,
            num_layers=int(self._field(f"{architecture}.block_count")),
            hidden_size=hidden,
            intermediate_size=int(self._field(f"{architecture}.feed_forward_length")),
            num_heads=heads,
            num_kv_heads=int(self._field(f"{architecture}.attention.head_count_kv", heads)),
            head_size=head_size,
            vocab_size=int(self._tensor_shape("token_embd.weight")[0]),
            context_length=int(self._field(f"{architecture}.context_length")),
            # The header holds float32; its shortest decimal is what the config said (1e-5, not 9.99…e-6).
            rms_norm_eps=_shortest(self._field(f"{architecture}.attention.layer_norm_rms_epsilon")),
            rope=self._rope(architecture),
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            output_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
            qk_norm=architecture == "qwen3",
            tied_head="output.weight" not in self._tensors,
            bos_token_id=self._vocabulary.bos_id,
            eos_token_ids=tuple(self._end_ids()),
        )

    def _rope(self, architecture: str) -> Rope:
        theta = _shortest(self._field(f"{architecture}.rope.freq_base", 10000.0))
        if "rope_freqs.weight" in self._tensors:
            divisors = np.asarray(self._tensors["rope_freqs.weight"].data, np.float32)
            return Rope(theta=theta, kind="divided", divisors=tuple(divisors.tolist()))
        kind = self._field(f"{architecture}.rope.scaling.type", "none")
        factor = _shortest(self._field(f"{architecture}.rope.scaling.factor", 1.0))
        if kind == "none":
            return Rope(theta=theta)
        if kind == "linear":
            return Rope(theta=theta, kind="linear", factor=factor)
        if kind == "yarn":
            original = int(self._field(f"{architecture}.rope.scaling.original_context_length"))
            return Rope(theta=theta, kind="yarn", factor=factor, original_context_length=original)
        raise CheckpointError(f"{self._path}: unsupported rope scaling {kind!r}; supported are linear and yarn")

    def _field(self, key: str, *default: Any) -> Any:
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise CheckpointError(f"{self._path}: the GGUF header lacks {key!r}")

    def _tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise CheckpointError(f"{self._path}: the tensor {name!r} is missing")
        # GGUF lists the fastest axis first.
        return tuple(int(extent) for extent in reversed(self._tensors[name].shape))

    def _check_tensors(self) -> None:
        from gguf import dequantize

        for name, shape in self.spec.tensors().items():
            came = self._tensor_shape(_gguf_name(name))
            if came != shape:
                raise CheckpointError(
                    f"{self._path}: {_gguf_name(name)} has shape {list(came)}; the header asks for {list(shape)}"
                )
            tensor = self._tensors[_gguf_name(name)]
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise CheckpointError(
                    f"{self._path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be dequantized"
                ) from None


def _gguf_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    _, layer, rest = name.split(".", 2)
    module, parameter = rest.rsplit(".", 1)
    return f"blk.{layer}.{_BLOCK_NAMES[module]}.{parameter}"


def _halves_from_pairs(value: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo llama.cpp's interleaving of rotated pairs: rows [heads × (size/2, 2)] → [heads × (2, size/2)]."""
    pairs = value.reshape(num_heads, value.shape[0] // num_heads // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


def _shortest(value: Any) -> float:
    return float(str(np.float32(value)))
