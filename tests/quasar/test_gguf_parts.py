"""GGUF files by any name, and those that were split into parts."""

import shutil

import numpy as np
import pytest

from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.gguf_file import GgufFile
from quasar.checkpoints.gguf_parts import gguf_parts
from quasar.errors import CheckpointError


@pytest.mark.parametrize("name", ["m-00000-of-00000.gguf", "m-00003-of-00002.gguf"])
def test_a_name_that_only_looks_like_a_part(tmp_path, name):
    assert gguf_parts(tmp_path / name) == (tmp_path / name,)


@pytest.mark.parametrize("name", ["model.GGUF", "model", "sha256-0123"])
def test_gguf_files_by_any_name(tmp_path, name):
    shutil.copy(open_checkpoint("smollm2").location, tmp_path / name)
    assert isinstance(open_checkpoint(str(tmp_path / name)), GgufFile)


def split(source, folder, counts, *, total=None):
    """A GGUF file in parts, as llama-gguf-split writes them."""
    import gguf

    reader = gguf.GGUFReader(source)
    tensors = list(reader.tensors)
    for number, count in enumerate(counts):
        path = folder / f"m-{number + 1:05d}-of-{len(counts):05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith("GGUF.") or field.name == "general.architecture":
                    continue
                kind = field.types[0]
                sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(counts))
        writer.add_int32("split.tensors.count", len(tensors) if total is None else total)
        start = sum(counts[:number])
        for tensor in tensors[start : start + count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def test_split_gguf_files_are_one_model(tmp_path):
    whole = open_checkpoint("smollm2")
    split(whole.location, tmp_path, [100, 172])
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        parts = open_checkpoint(str(tmp_path / name))
        assert parts.location.name == "m-00001-of-00002.gguf"
        assert len(parts.files) == 2
        assert parts.spec == whole.spec
        assert parts.text().tokenizer.to_str() == whole.text().tokenizer.to_str()
        for tensor in ("embed_tokens.weight", "layers.29.mlp.down_proj.weight"):
            np.testing.assert_array_equal(parts.read(tensor), whole.read(tensor))
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"one of 2 parts, and .*m-00002-of-00002\.gguf is missing"):
        open_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"))
    with pytest.raises(CheckpointError, match=r"has 2 parts, and 1 are named so"):
        open_checkpoint(str(tmp_path / "elsewhere.gguf"))


def test_parts_that_lack_tensors(tmp_path):
    split(open_checkpoint("smollm2").location, tmp_path, [100, 172], total=273)
    with pytest.raises(CheckpointError, match="hold 272 tensors, the header says 273"):
        open_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"))
