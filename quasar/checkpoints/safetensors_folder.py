"""A Hugging Face folder: config.json and safetensors shards, read lazily. Pickled weights are never opened."""

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.architectures.base import fused_rows, own_rows, stored_shapes
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.checkpoint_text import CheckpointText
from quasar.checkpoints.config import decoder_config, spec_from_config
from quasar.checkpoints.folder_text import folder_text
from quasar.checkpoints.prequantized.choose_layout import KEYS, make_layout
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.checkpoints.reference_config import reference_config
from quasar.checkpoints.shards import INDEX, check_numbers, find_shards, open_shard, read_json
from quasar.checkpoints.spec import DecoderSpec, split_name
from quasar.errors import CheckpointError

_FLOAT_DTYPES = {"F32", "F16", "BF16", "F64"}
# What stands before a decoder's names where a model has other parts: as published, and as transformers 5 saves it.
_DECODER_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.")
# Buffers that old versions of transformers saved in every layer: they follow from the config.
_LEFTOVER = re.compile(r"rotary_emb\.|^(self_attn|attention)\.(masked_)?bias$")
_EXPECTED = "a Hugging Face model folder or a .gguf file"
_TEXT_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json"),
)


_log = logging.getLogger("quasar.checkpoints")


class SafetensorsFolder:
    """Weights of a local folder. Opening checks every shard's header against the spec; reading maps one tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        whole = read_json(folder / "config.json", _EXPECTED)
        self.config = dict(decoder_config(whole))
        self._is_wrapped = "text_config" in whole and "text_config" not in self.config
        self.spec: DecoderSpec = spec_from_config(self.config, read_json(folder / "generation_config.json"))
        self._architecture = ARCHITECTURES[self.spec.architecture]
        self._shard_of = self._index()
        quantization = self.config.get("quantization_config")
        is_quantized = any(name.endswith(KEYS) for name in self._shard_of)
        # Beside float weights a config may say what it likes.
        self._layout = make_layout(quantization) if is_quantized and isinstance(quantization, dict) else None
        self.spec = self._with_own_head(self.spec)
        leftover = self._leftover_quantization()
        self._check_tensors()
        if leftover:
            _log.warning("%s: config.json says %s, and the weights are float: taken as they are", folder, leftover)

    @property
    def location(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def files(self) -> tuple[Path, ...]:
        """Shards, configs and tokenizer files, sorted."""
        names = {self._folder / name for name in ("config.json", "generation_config.json", *_TEXT_FILES)}
        shards = {path for path, _ in self._shard_of.values()}
        return tuple(sorted(path for path in names | shards if path.is_file()))

    @property
    def quantized_by(self) -> str:
        """The layout's method where any weight is quantized."""
        if self._layout is None or not any(map(self._parts, stored_shapes(self.spec, self._own_name))):
            return ""
        return self._layout.method

    def read(self, name: str) -> NDArray[Any]:
        """One tensor by canonical name, in its stored precision; float32 where it is quantized."""
        own = self._own_name(name)
        quantized = self._quantized(own)
        tensor = self._stored(own) if quantized is None else quantized.dequantized()
        return own_rows(name, tensor, self.spec, self._architecture.fused)

    def prequantized(self, name: str) -> PrequantizedWeight | None:
        """A quantized weight by the canonical name of its tensor; None for floats."""
        found, rows = self._quantized(self._own_name(name)), fused_rows(name, self._architecture.fused)
        layer, _ = split_name(name)
        if found is None or rows is None or layer is None:
            return found
        return found.rows(rows.rows(self.spec.layers[layer]))

    def transformers_config(self) -> Any:
        """`AutoConfig` of the folder, or of the family's reference; code from the checkpoint is never run."""
        from transformers import AutoConfig

        if (reference := self._architecture.reference) is not None:
            return reference_config(self.spec, reference.model_type, reference.values(self.spec))

        try:
            config = AutoConfig.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its checks do
            raise CheckpointError(f"{self._folder}: transformers cannot read config.json ({error})") from None
        if self._is_wrapped:
            config = config.get_text_config()
        # What the weights say goes before what the config says.
        config.tie_word_embeddings = self.spec.tied_head
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def text(self) -> CheckpointText:
        """The tokenizer and what goes with it; code from the folder is never run."""
        generation = read_json(self._folder / "generation_config.json")
        return folder_text(self._folder, self.config, generation)

    def _index(self) -> dict[str, tuple[Path, str]]:
        """Canonical name → (shard, name in the shard)."""
        shards, named = find_shards(self._folder, _convert)
        found: dict[str, tuple[Path, str]] = {}
        for path in shards:
            with open_shard(path) as shard:
                for stored in shard.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                    name = self._canonical_name(stored)
                    if name is None:
                        continue
                    if name in found and named.get(stored) != path.name:
                        if stored not in named:
                            raise CheckpointError(
                                f"{self._folder}: {stored!r} stands in {found[name][0].name} and in {path.name}: "
                                "delete the file that is not part of the model"
                            )
                        continue
                    found[name] = (path, stored)
        if named:
            self._check_index(self._folder / INDEX, named, found)
        else:
            check_numbers(self._folder, shards)
        return found

    def _canonical_name(self, stored: str) -> str | None:
        """A stored tensor's canonical name; None for one of another part of the model."""
        inner = _decoder_name(stored) if self._is_wrapped else stored.removeprefix("model.")
        return None if inner is None else self._architecture.canonical_name(inner)

    def _check_index(self, index: Path, named: Mapping[str, Any], found: Mapping[str, tuple[Path, str]]) -> None:
        """Raise `CheckpointError` naming a tensor of which index and shards do not say the same.

        They are of different downloads or conversions then, and so may the weights be.
        """
        again = "download the folder again, or delete the index if the shards are those of the model"
        for stored, shard in named.items():
            name = self._canonical_name(stored)
            if name is None or _is_leftover(name):
                continue
            if name not in found:
                raise CheckpointError(f"{index} says that {shard} holds {stored!r}, and no shard does: {again}")
            if found[name][0].name != shard:
                raise CheckpointError(
                    f"{index} says that {shard} holds {stored!r}, and {found[name][0].name} does: {again}"
                )
        for name, (path, stored) in found.items():
            if stored not in named and not _is_leftover(name):
                raise CheckpointError(f"{path} holds {stored!r}, which {INDEX} does not name: {again}")

    def _stored(self, name: str) -> NDArray[Any]:
        """A tensor by the index's name."""
        path, stored = self._shard_of[name]
        with open_shard(path) as shard:
            tensor: NDArray[Any] = shard.get_tensor(stored)
        return tensor

    def _parts(self, name: str) -> list[str]:
        """Of the tensors that a quantized weight is stored in, those that there are; none where it is stored as floats.

        `name`: the index's of the weight, `<module>.weight`.
        """
        module, _, parameter = name.rpartition(".")
        if self._layout is None or parameter != "weight" or f"{module}.{self._layout.key}" not in self._shard_of:
            return []
        return [part for part in self._layout.parts if f"{module}.{part}" in self._shard_of]

    def _quantized(self, name: str) -> PrequantizedWeight | None:
        """A weight by the index's name of it; None where it is stored as floats."""
        parts, module = self._parts(name), name.rpartition(".")[0]
        if not parts or self._layout is None:
            return None
        tensors = {part: self._stored(f"{module}.{part}") for part in parts}
        return self._layout.weight(tensors, f"{self._folder}: {module}")

    def _own_name(self, name: str) -> str:
        """What the index calls a tensor, by canonical name: the fused one that it is part of has a name of its own."""
        return name if fused_rows(name, self._architecture.fused) is None else self._architecture.checkpoint_name(name)

    def _leftover_quantization(self) -> str:
        """The method of a `quantization_config` beside float weights, where it does no harm; "" if there is none.

        Raises `CheckpointError` if there are quantized tensors of a layout that is not read.
        """
        quantization = self.config.get("quantization_config")
        if not quantization:
            return ""
        if not isinstance(quantization, dict):
            raise CheckpointError(f"config.json: quantization_config is {quantization!r}; a JSON object was expected")
        method = str(quantization.get("quant_method", "an unnamed quantization"))
        # BitNet's float weights are rounded in every pass: without that it is another model.
        is_quantized = self._stands_beside_a_weight()
        if method == "bitnet" or (is_quantized and self._layout is None):
            raise CheckpointError(
                f"{self._folder}: the checkpoint is already quantized ({method}); build from the float checkpoint that "
                "it was made from, or from one in the layout of GPTQ, AWQ or compressed-tensors"
            )
        return "" if is_quantized else method

    def _stands_beside_a_weight(self) -> bool:
        """Whether a tensor belongs to a weight or stands for it (qweight, weight_scale, weight.absmax, …)."""
        expected = stored_shapes(self.spec, self._own_name)
        owners = {name.rpartition(".")[0] for name in expected}
        for name in self._shard_of:
            if name in expected or name.endswith(".bias"):
                continue
            parts = name.split(".")
            if any(".".join(parts[:length]) in owners for length in range(1, len(parts))):
                return True
        return False

    def _with_own_head(self, spec: DecoderSpec) -> DecoderSpec:
        """An LM head beside `tie_word_embeddings`, as in transformers: it counts if it is another one.

        Where it is the only one of the two, it is the embedding as well.
        """
        if spec.tied_head and self._parts("lm_head.weight"):
            return replace(spec, tied_head=False)
        if not spec.tied_head or "lm_head.weight" not in self._shard_of:
            return spec
        if "embed_tokens.weight" not in self._shard_of:
            self._shard_of["embed_tokens.weight"] = self._shard_of["lm_head.weight"]
            return spec
        if np.array_equal(self.read("lm_head.weight"), self.read("embed_tokens.weight")):
            return spec
        _log.warning(
            "%s: config.json ties the LM head to the embedding, and the weights have their own: it is used",
            self._folder,
        )
        return replace(spec, tied_head=False)

    def _check_tensors(self) -> None:
        expected = stored_shapes(self.spec, self._own_name)
        for name, shape in expected.items():
            if parts := self._parts(name):
                self._check_quantized(name, parts, shape)
                continue
            if name not in self._shard_of:
                own = self._architecture.checkpoint_name(name)
                raise CheckpointError(f"{self._folder}: the tensor {own!r} is missing from the safetensors weights")
            path, stored = self._shard_of[name]
            with open_shard(path) as shard:
                view = shard.get_slice(stored)
                came, dtype = tuple(view.get_shape()), view.get_dtype()
            if came != shape:
                raise CheckpointError(f"{path}: {stored} has shape {list(came)}; the config asks for {list(shape)}")
            if dtype not in _FLOAT_DTYPES:
                raise CheckpointError(f"{path}: {stored} is stored as {dtype}; float weights were expected")
        parts_of = {f"{name.removesuffix('weight')}{part}" for name in expected for part in self._parts(name)}
        for name in self._shard_of:
            if name in parts_of or self._is_empty_bias(name):
                continue
            layer, _ = split_name(name)
            ours = layer is not None and layer < self.spec.num_layers and not _is_leftover(name)
            outside = layer is None and name in ("norm.bias", "lm_head.bias")
            if name not in expected and (ours or outside):
                own = self._architecture.checkpoint_name(name)
                kind = "bias" if name.endswith(".bias") else "weight"
                raise CheckpointError(
                    f"{self._folder}: unexpected tensor {own!r}: the config has no such {kind}, and without it this "
                    "would be another model"
                )

    def _check_quantized(self, name: str, parts: Sequence[str], shape: tuple[int, ...]) -> None:
        """Raise `CheckpointError` where a quantized weight, by the index's name, is of another shape."""
        assert self._layout is not None
        module, shapes = name.rpartition(".")[0], {}
        for part in parts:
            path, stored = self._shard_of[f"{module}.{part}"]
            with open_shard(path) as shard:
                shapes[part] = tuple(shard.get_slice(stored).get_shape())
        try:
            came = self._layout.shape(shapes)
        except (KeyError, ValueError, IndexError):
            raise CheckpointError(
                f"{self._folder}: {module} has {', '.join(f'{part} {list(one)}' for part, one in shapes.items())}, "
                f"which is no weight in the layout of {self._layout.method}"
            ) from None
        if came != shape:
            raise CheckpointError(
                f"{self._folder}: {module} holds a weight of {list(came)}, quantized by {self._layout.method}; the "
                f"config asks for {list(shape)}"
            )

    def _is_empty_bias(self, name: str) -> bool:
        """Whether a bias of zeros stands beside a quantized weight: old tools write one for every module."""
        module, _, parameter = name.rpartition(".")
        return parameter == "bias" and bool(self._parts(f"{module}.weight")) and not self._stored(name).any()


def _is_leftover(name: str) -> bool:
    return _LEFTOVER.search(split_name(name)[1]) is not None


def _convert(folder: Path) -> str:
    code = (
        f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; a, b = {str(folder)!r}, "
        f"{folder.name + '-safetensors'!r}; M.from_pretrained(a).save_pretrained(b); "
        "T.from_pretrained(a).save_pretrained(b)"
    )
    return f"convert it, if you trust it: python -c {shlex.quote(code)}"


def _decoder_name(stored: str) -> str | None:
    """A tensor's name in the decoder alone, for models that take images as well; None for one of another part."""
    for prefix in _DECODER_PREFIXES:
        if stored.startswith(prefix):
            return stored.removeprefix(prefix)
    return stored if stored.startswith("lm_head.") else None
