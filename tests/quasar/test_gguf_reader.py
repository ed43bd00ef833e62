"""GGUF headers: read as the package gguf reads them, no further than asked for, and refused where they are cut."""

import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest

from quasar.checkpoints import gguf_reader, open_checkpoint
from quasar.checkpoints.gguf_reader import GgufReader
from quasar.errors import CheckpointError
from tests.tiny_gguf import save_tiny_gguf

NUM_TOKENS = 260_000
UINT32, STRING, ARRAY = 4, 8, 9


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(*fields, version=3, tensors=0):
    """A file of fields alone: (key, kind, the value's bytes)."""
    body = b"".join(text(key.encode()) + struct.pack("<I", kind) + value for key, kind, value in fields)
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields)) + body


def vocabulary(architecture, *more):
    """The header of a model with a vocabulary as large as Gemma's, which stands after the architecture."""
    tokens = struct.pack("<IQ", STRING, NUM_TOKENS) + b"".join(text(b"%d" % token) for token in range(NUM_TOKENS))
    sizes = {"block_count": 1, "embedding_length": 64, "attention.head_count": 4, "feed_forward_length": 64}
    return header(
        ("general.architecture", STRING, text(architecture.encode())),
        ("tokenizer.ggml.tokens", ARRAY, tokens),
        *((f"{architecture}.{key}", UINT32, struct.pack("<I", value)) for key, value in sizes.items()),
        *more,
    )


@pytest.fixture
def walked(monkeypatch):
    """How many strings of arrays were stepped over, and how many were decoded."""
    counts = {"stepped": 0, "decoded": 0}
    skip, decode = gguf_reader._Cursor._after_strings, gguf_reader._Cursor._strings

    def counted_skip(self, count, at):
        counts["stepped"] += count
        return skip(self, count, at)

    def counted_decode(self, count, at):
        counts["decoded"] += count
        return decode(self, count, at)

    monkeypatch.setattr(gguf_reader._Cursor, "_after_strings", counted_skip)
    monkeypatch.setattr(gguf_reader._Cursor, "_strings", counted_decode)
    return counts


def test_an_unsupported_architecture_is_refused_before_its_vocabulary_is_walked(tmp_path, walked):
    (tmp_path / "m.gguf").write_bytes(vocabulary("mamba"))
    with pytest.raises(CheckpointError, match=r"unsupported architecture: GGUF 'mamba' in .*; supported are llama"):
        open_checkpoint(str(tmp_path / "m.gguf"))
    # The architecture's name is the one string.
    assert walked == {"stepped": 1, "decoded": 1}


@pytest.mark.parametrize(
    ("option", "kind", "value", "message"),
    [
        ("expert_count", UINT32, struct.pack("<I", 8), r"mixture of experts \(llama\.expert_count is 8\)"),
        ("rope.scaling.type", STRING, text(b"ntk"), "unsupported rope scaling 'ntk'"),
        ("rope.dimension_count", UINT32, struct.pack("<I", 8), "8 of 16 head channels rotate"),
    ],
)
def test_an_unsupported_option_is_refused_before_a_token_is_decoded(tmp_path, walked, option, kind, value, message):
    (tmp_path / "m.gguf").write_bytes(vocabulary("llama", (f"llama.{option}", kind, value)))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path / "m.gguf"))
    assert walked["decoded"] < 20


WHOLE = header(("general.architecture", STRING, text(b"llama")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file: it begins with b''"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'vers', and b'GGUF' was expected"),
        (WHOLE[:10], "is not a whole GGUF file: it has 10 bytes, and 24 or more"),
        (WHOLE[:-2], "is not a whole GGUF file"),
        (header(version=1), "has GGUF version 1; 2 or 3 was expected"),
        (WHOLE[:4] + WHOLE[7:3:-1] + WHOLE[8:], "is a big-endian GGUF file: convert it"),
        (header(("a", 77, b"")), "a field has the unknown type 77"),
        (header(("a", STRING, text(b"b")), ("a", STRING, text(b"b"))), "says 'a' twice"),
        (header(("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60))), "is not a whole GGUF file"),
        (header(("a", ARRAY, struct.pack("<IQQ", STRING, 1, (1 << 64) - 1))), "is not a whole GGUF file"),
        (header(("a", ARRAY, struct.pack("<IQQQ", STRING, 2, 1 << 20, 0))), "is not a whole GGUF file"),
        (header(("general.architecture", STRING, text(b"\xff"))), "text that is not UTF-8"),
        (header((chr(97), STRING, text(b"b"))), "lacks 'general.architecture'"),
    ],
)
def test_what_is_no_whole_gguf_file(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    content = save_tiny_gguf(tmp_path / "m.gguf").read_bytes()
    for length in [*range(0, 4000, 61), *range(4000, len(content), 20011), len(content) - 64]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"is not a (whole )?GGUF file"):
            open_checkpoint(str(tmp_path / "cut.gguf"))


def test_a_damaged_header_raises_nothing_else(tmp_path):
    content = save_tiny_gguf(tmp_path / "m.gguf").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[int(random.integers(8000))] = int(random.integers(256))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with suppress(CheckpointError):
            open_checkpoint(str(tmp_path / "damaged.gguf"))


def test_every_kind_of_value_is_read_as_the_package_gguf_reads_it(tmp_path):
    path, kinds = tmp_path / "m.gguf", gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        kinds.UINT8: 200,
        kinds.INT8: -3,
        kinds.UINT16: 60000,
        kinds.INT16: -300,
        kinds.UINT32: 1 << 31,
        kinds.INT32: -5,
        kinds.FLOAT32: 0.1,
        kinds.UINT64: 1 << 63,
        kinds.INT64: -7,
        kinds.FLOAT64: 0.1,
        kinds.BOOL: True,
        kinds.STRING: "é",
    }
    for kind, value in numbers.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value, value], kinds.ARRAY, sub_type=kind)
    writer.add_array("nothing", [""])
    tensors = {"f32": (np.float32, (3, 32)), "f16": (np.float16, (2, 32)), "i32": (np.int32, (5,))}
    for name, (dtype, shape) in tensors.items():
        writer.add_tensor(name, np.arange(np.prod(shape)).reshape(shape).astype(dtype))
    blocks = gguf.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("bf16", np.ones((2, 64), np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GgufReader(path), gguf.GGUFReader(path)
    own = {name: field.contents() for name, field in ours.fields.items()}
    assert own == {name: one.contents() for name, one in theirs.fields.items() if not name.startswith("GGUF.")}
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.tensor_type, list(one.shape)) == (other.name, other.tensor_type, other.shape.tolist())
        assert one.data.dtype == other.data.dtype
        np.testing.assert_array_equal(one.data, other.data)
