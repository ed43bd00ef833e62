"""A GGUF file: spec from its header, weights dequantized block by block to float32."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.architectures.base import GgufFormat, own_rows, stored_shapes
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.checkpoint_text import CheckpointText, chat_templates, sampling_defaults
from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.gguf_parts import check_parts, gguf_parts
from quasar.checkpoints.gguf_reader import GgufReader, GgufTensor
from quasar.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from quasar.checkpoints.prequantized.gguf_blocks import prequantized_blocks
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.checkpoints.reference_config import reference_config
from quasar.checkpoints.spec import DecoderSpec
from quasar.errors import CheckpointError

# Values that are dequantized at once.
_VALUES_AT_ONCE = 1 << 18
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
# Divisors of rotary frequencies, as llama.cpp names them.
_ROPE_DIVISORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# A buffer of old conversions, which follows from the header.
_LEFTOVERS = ("attn_rot_embd.weight",)
# What a model that takes images has beside its decoder, where both are in one file.
_OTHER_PARTS = ("v.", "mm.")


class GgufFile:
    """Weights of one GGUF file, or of all parts of a split one, by canonical name."""

    def __init__(self, path: Path) -> None:
        self._parts = gguf_parts(path)
        self._path = path = self._parts[0]
        readers = [GgufReader(part) for part in self._parts]
        # First of all: it is among the first fields, and the others are many.
        self._format = _find_format(path, readers[0])
        check_parts(self._parts, readers)
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        self._header = GgufHeader(path, readers[0].fields, self._tensors)
        try:
            self.spec: DecoderSpec = self._format.from_header(self._header)
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

    @property
    def quantized_by(self) -> str:
        """Nothing that would decide for `--precision stored`: a GGUF file is also what float models come as."""
        return ""

    def read(self, name: str) -> NDArray[Any]:
        """One tensor by canonical name: float16 where stored so, else float32."""
        from gguf import GGMLQuantizationType

        tensor = self._tensors[self._format.tensor_name(name)]
        if tensor.tensor_type in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
            value = np.array(tensor.data)
        else:
            value = _dequantized(tensor)
        return self._format.restore(name, own_rows(name, value, self.spec, self._format.fused), self.spec)

    def prequantized(self, name: str) -> PrequantizedWeight | None:
        """The blocks of one tensor by canonical name; None for floats and for grids that are not kept."""
        tensor = self._tensors[self._format.tensor_name(name)]
        found = prequantized_blocks(tensor.tensor_type.name, tensor.data) if tensor.data.ndim == 2 else None
        if found is None:
            return None

        def own(array: NDArray[Any]) -> NDArray[Any]:
            return self._format.restore(name, own_rows(name, array, self.spec, self._format.fused), self.spec)

        offset = None if found.offset is None else own(found.offset)
        taken = replace(found, values=own(found.values), scale=own(found.scale), offset=offset)
        return taken.check(f"{self._path}: {tensor.name}")

    def transformers_config(self) -> Any:
        """A transformers config made from the header."""
        architecture = ARCHITECTURES[self.spec.architecture]
        model_type, values = architecture.name, self._format.transformers_values(self.spec)
        if (reference := architecture.reference) is not None:
            model_type, values = reference.model_type, reference.values(self.spec)
        return reference_config(self.spec, model_type, values)

    def text(self) -> CheckpointText:
        """The tokenizer that the header describes, its chat templates, end tokens and sampling defaults.

        Raises `CheckpointError` naming a tokenizer or pre-tokenizer that is not supported.
        """
        header = self._header
        vocabulary = header.vocabulary
        try:
            tokenizer = tokenizer_from_gguf(vocabulary)
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from None
        named = {
            str(name): header.field(f"tokenizer.chat_template.{name}", "")
            for name in header.field("tokenizer.chat_templates", [])
        }
        draws = header.field("general.sampling.temp", None) is not None
        return CheckpointText(
            tokenizer=tokenizer,
            chat_templates=chat_templates({"default": header.field("tokenizer.chat_template", ""), **named}),
            bos_token="" if vocabulary.bos_id is None else vocabulary.tokens[vocabulary.bos_id],
            eos_token="" if vocabulary.eos_id is None else vocabulary.tokens[vocabulary.eos_id],
            end_ids=header.end_ids(),
            sampling=sampling_defaults(
                {name: header.field(f"general.sampling.{key}", None) for name, key in _SAMPLING.items()}, draws=draws
            ),
        )

    def _check_tensors(self) -> None:
        from gguf import dequantize

        expected = stored_shapes(self.spec, self._format.tensor_name)
        for stored, shape in expected.items():
            came = self._header.tensor_shape(stored)
            if came != shape:
                raise CheckpointError(
                    f"{self._path}: {stored} has shape {list(came)}; the header asks for {list(shape)}"
                )
            tensor = self._tensors[stored]
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise CheckpointError(
                    f"{self._path}: {stored} is stored as {tensor.tensor_type.name}, which cannot be dequantized"
                ) from None
        for stored in self._tensors:
            if stored not in expected and self._changes_the_decoder(stored):
                raise CheckpointError(
                    f"{self._path}: unexpected tensor {stored!r}: the family has no such tensor here, and without it "
                    "this would be another model"
                )

    def _changes_the_decoder(self, stored: str) -> bool:
        """Whether a tensor that the spec does not name has a part in what the decoder computes."""
        if stored in _ROPE_DIVISORS:
            # Llama 3's files have them, and the header reads them (`GgufHeader.rope`); a family that does not would
            # rotate by other frequencies than the file's.
            return not any(rope.kind == "divided" for rope in self.spec.ropes)
        block = _BLOCK.match(stored)
        if block is not None:
            # Blocks after the last one predict further tokens (llama.cpp's nextn).
            return int(block[1]) < self.spec.num_layers and block[2] not in _LEFTOVERS
        return not stored.startswith(_OTHER_PARTS)


def _dequantized(tensor: GgufTensor) -> NDArray[np.float32]:
    """A tensor's values, rows at a time: what fits the processor's cache takes half the time, and no second copy."""
    from gguf import dequantize

    stored = tensor.data.reshape(-1, tensor.data.shape[-1])
    first = dequantize(stored[:1], tensor.tensor_type)
    values = np.empty((len(stored), first.shape[-1]), np.float32)
    rows = max(1, _VALUES_AT_ONCE // first.shape[-1])
    for start in range(0, len(stored), rows):
        values[start : start + rows] = dequantize(stored[start : start + rows], tensor.tensor_type)
    return values.reshape(*tensor.data.shape[:-1], -1)


def _find_format(path: Path, reader: GgufReader) -> GgufFormat:
    known = {one.gguf.architecture: one.gguf for one in ARCHITECTURES.values() if one.gguf}
    field = reader.find("general.architecture")
    if field is None:
        raise CheckpointError(f"{path}: the GGUF header lacks 'general.architecture'")
    name = field.contents()
    if name in known:
        return known[name]
    raise CheckpointError(f"unsupported architecture: GGUF {name!r} in {path}; supported are {', '.join(known)}")
