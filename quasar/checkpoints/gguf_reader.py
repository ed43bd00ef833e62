"""The fields and tensors of one GGUF file, read from a memory map.

A field is decoded when it is asked for, and the header is walked no further than to the field that is: a vocabulary has
260,000 strings, and what cannot be built is known from the first few fields. (The package `gguf` makes a numpy view of
every string, which takes half a minute.)
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Kind of value → numpy's name of it; all of them little-endian.
_SCALARS: Mapping[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# Tensor types that are stored as numbers, by gguf's name; all others are blocks of bytes.
_NUMBERS: Mapping[str, str] = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufField:
    """A value in the header: its kind, and the bytes [start, end) that it takes."""

    kind: int
    start: int
    end: int
    cursor: "_Cursor" = field(repr=False)

    def contents(self) -> Any:
        """The value: a string, a number, a truth value, or a list of them.

        Raises `CheckpointError` for a string that is not UTF-8.
        """
        try:
            return self.cursor.value(self.kind, self.start)[0]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.cursor.path}: the header holds text that is not UTF-8 ({error})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A stored tensor: extents with the fastest axis first, gguf's type, and a view of the numbers or blocks."""

    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    data: NDArray[Any]


class GgufReader:
    """One file. Opening it reads magic and version alone.

    Raises `CheckpointError` for a file that is not GGUF, that is of another version, or that ends too early; fields and
    tensors raise it when they are read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cursor = _Cursor(path)
        self._num_tensors, self._num_fields = _check_head(self._cursor)
        self._found: dict[str, GgufField] = {}
        self._rest = self._walk()
        # Where tensors are listed, once the walk is over.
        self._end = 0

    def find(self, key: str) -> GgufField | None:
        """A field, or None where there is none; what stands after it is not read."""
        while key not in self._found:
            one = next(self._rest, None)
            if one is None:
                return None
        return self._found[key]

    @cached_property
    def fields(self) -> Mapping[str, GgufField]:
        """All fields by key."""
        for _ in self._rest:
            pass
        return self._found

    @cached_property
    def tensors(self) -> list[GgufTensor]:
        """All tensors, in the order in which the file lists them."""
        alignment = self.fields["general.alignment"].contents() if "general.alignment" in self.fields else _ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self._path}: general.alignment is {alignment!r}; a power of two was expected")
        listed, at = [], self._end
        for _ in range(self._num_tensors):
            name, at = self._cursor.text(at)
            axes, at = self._cursor.number("<u4", at)
            extents, at = self._cursor.numbers("<u8", axes, at)
            kind, at = self._cursor.number("<u4", at)
            offset, at = self._cursor.number("<u8", at)
            listed.append((name, tuple(extents), kind, offset))
        start = -(-at // alignment) * alignment
        if len({name for name, *_ in listed}) < len(listed):
            raise CheckpointError(f"{self._path} lists a tensor twice: make the file anew")
        return [self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in listed]

    def _walk(self) -> Iterator[str]:
        """The keys one by one; values are stepped over by their lengths."""
        at = _HEAD.size
        for _ in range(self._num_fields):
            key, at = self._cursor.text(at)
            kind, start = self._cursor.number("<u4", at)
            at = self._cursor.skip(kind, start)
            if key in self._found:
                raise CheckpointError(f"{self._path} says {key!r} twice: make the file anew")
            self._found[key] = GgufField(kind=kind, start=start, end=at, cursor=self._cursor)
            yield key
        self._end = at

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        # Imported where a file is taken: a refusal does not wait for it.
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        try:
            tensor_type = GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(
                f"{self._path}: {name} is stored as type {kind}, which the package gguf does not know: take a newer "
                "gguf, or a file of another quantization"
            ) from None
        extents = tuple(reversed(shape))
        number = _NUMBERS.get(tensor_type.name)
        block, size = GGML_QUANT_SIZES[tensor_type]
        if number is None and (not shape or shape[0] % block):
            raise CheckpointError(
                f"{self._path}: {name} has shape {list(extents)}; rows of {tensor_type.name} are multiples of {block}"
            )
        stored = extents if number is not None else tuple(map(int, quant_shape_to_byte_shape(extents, tensor_type)))
        count = 1
        for extent in shape:
            count *= extent
        view = self._cursor.view(start, count * size // block)
        return GgufTensor(
            name=name, shape=shape, tensor_type=tensor_type, data=view.view(number or np.uint8).reshape(stored)
        )


_HEAD = struct.Struct("<4sIQQ")


def _check_head(cursor: "_Cursor") -> tuple[int, int]:
    """How many tensors and fields there are."""
    path, began = cursor.path, bytes(cursor.data[: len(MAGIC)])
    if began != MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file: it begins with {began!r}, and {MAGIC!r} was expected: download it again"
        )
    head = bytes(cursor.view(0, _HEAD.size))
    _, version, tensors, fields = _HEAD.unpack(head)
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path} is a big-endian GGUF file: convert it to little-endian (gguf-convert-endian)")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} has GGUF version {version}; 2 or 3 was expected: make the file anew")
    return tensors, fields


class _Cursor:
    """Values by their place in the file; each comes with the place after it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # An empty file cannot be mapped.
                self._bytes: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
                )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
        self.data: NDArray[np.uint8] = np.frombuffer(self._bytes, np.uint8)

    def view(self, start: int, size: int) -> NDArray[np.uint8]:
        """Bytes that must be there."""
        if start + size > len(self.data):
            raise CheckpointError(
                f"{self.path} is not a whole GGUF file: it has {len(self.data)} bytes, and {start + size} or more were "
                "expected: download it again"
            )
        return self.data[start : start + size]

    def numbers(self, dtype: str, count: int, at: int) -> tuple[list[Any], int]:
        """Numbers or truth values, one after another."""
        size = count * np.dtype(dtype).itemsize
        # A truth value is any byte but zero.
        values = self.view(at, size).view(np.uint8 if dtype == "?" else dtype)
        return (values != 0 if dtype == "?" else values).tolist(), at + size

    def number(self, dtype: str, at: int) -> tuple[Any, int]:
        """One number or truth value."""
        (value,), after = self.numbers(dtype, 1, at)
        return value, after

    def text(self, at: int) -> tuple[str, int]:
        """A key or a tensor's name."""
        length, at = self.number("<u8", at)
        try:
            return str(bytes(self.view(at, length)), "utf-8"), at + length
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: a name is not UTF-8 ({error}): download it again") from None

    def value(self, kind: int, at: int) -> tuple[Any, int]:
        """A field's value."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], at)
        if kind == _STRING:
            (text,), after = self._strings(1, at)
            return text, after
        inner, at = self.number("<u4", at)
        count, at = self.number("<u8", at)
        if inner in _SCALARS:
            return self.numbers(_SCALARS[inner], count, at)
        if inner == _STRING:
            return self._strings(count, at)
        values = []
        for _ in range(count):
            value, at = self.value(inner, at)
            values.append(value)
        return values, at

    def skip(self, kind: int, at: int) -> int:
        """The place after a value, none of which is decoded."""
        if kind in _SCALARS:
            return self._after(at, np.dtype(_SCALARS[kind]).itemsize)
        if kind == _STRING:
            length, at = self.number("<u8", at)
            return self._after(at, length)
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path} is damaged: a field has the unknown type {kind}: download it again")
        inner, at = self.number("<u4", at)
        count, at = self.number("<u8", at)
        if inner in _SCALARS:
            return self._after(at, count * np.dtype(_SCALARS[inner]).itemsize)
        if inner == _STRING:
            return self._after_strings(count, at)
        for _ in range(count):
            at = self.skip(inner, at)
        return at

    def _after(self, at: int, size: int) -> int:
        self.view(at, size)
        return at + size

    def _after_strings(self, count: int, at: int) -> int:
        """The place after an array of strings. Each has its length, so all are stepped over, one number for each."""
        self.view(at, count * _LENGTH.size)
        unpack, data = _LENGTH.unpack_from, self._bytes
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):
            self.view(at, _LENGTH.size)  # says what is missing
            raise
        return self._after(at, 0)

    def _strings(self, count: int, at: int) -> tuple[list[str], int]:
        end = self._after_strings(count, at)
        data, at, start, found = self._bytes[at:end], 0, at, []
        unpack = _LENGTH.unpack_from
        for _ in range(count):
            first = at + 8
            at = first + unpack(data, at)[0]
            found.append(data[first:at].decode())
        return found, start + at
