"""What was generated, on disk: shards of arrays that are read in place, and an index that vouches for each.

A shard's files are written and flushed to disk, then a line of the index names them and their hashes. A kill or a full
disk loses what no line names; what a line names and is not whole any more is dropped when the folder is opened.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.errors import BuildError
from quasar.files import sha256_file, sha256_json, write_json
from quasar.run_lock import take_lock

# Positions of a shard: half a minute of generation.
SHARD_POSITIONS = 8192
# What a position is to the training: text that the model was given, words of a user that it wrote, its answer.
GIVEN, USER, ANSWER = 0, 1, 2
_INDEX, _IDENTITY = "index.jsonl", "data.json"
_ARRAYS = ("tokens", "kinds", "features", "likely", "log_probabilities")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSequence:
    """One sequence of T tokens with what the verifier had for each.

    `tokens` int32 [T]; `kinds` int8 [T]; `features` float16 [T, F]: hidden states; `likely` int32 [T, 32] and
    `log_probabilities` float16 [T, 32]: the likeliest next tokens, -inf where nobody asked. `greedy`: the answer's
    tokens are the likeliest ones.
    """

    number: int
    greedy: bool
    tokens: NDArray[np.int32]
    kinds: NDArray[np.int8]
    features: NDArray[np.float16]
    likely: NDArray[np.int32]
    log_probabilities: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, first: int, end: int) -> "GeneratedSequence":
        """Some of its positions."""
        arrays = {name: getattr(self, name)[first:end] for name in _ARRAYS}
        return GeneratedSequence(number=self.number, greedy=self.greedy, **arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """A line of the index; `sequences`: number, tokens, answer's tokens and greediness of each, in order."""

    number: int
    sequences: list[list[int]]
    files: dict[str, dict[str, Any]]


class DataFolder:
    """Sequences of one engine, prompts and seed (`identity`), kept as they come.

    Raises `BuildError` if the folder holds those of another.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        shard_positions: int = SHARD_POSITIONS,
        read_only: bool = False,
    ) -> None:
        """Open it; unless it is `read_only`, what no line of the index vouches for is deleted."""
        self.path = path
        self._shard_positions = shard_positions
        self._waiting: list[GeneratedSequence] = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._check_identity(identity)
            self._shards = self._read_index(repair=not read_only)
            if not read_only:
                self._drop_others()
        except OSError as error:
            raise self._failure(error) from None

    @classmethod
    @contextmanager
    def writing(cls, path: Path, identity: Mapping[str, Any]) -> "Iterator[DataFolder]":
        """The folder, for one run at a time: two would give their shards the same names."""
        try:
            lock = take_lock(
                path.with_name(f".{path.name}.lock"),
                busy=f"another training writes text to {path}: wait for it, or choose another folder",
            )
        except OSError as error:
            raise BuildError(f"{path} cannot be written ({error.strerror}): choose another folder") from None
        try:
            yield cls(path, identity)
        finally:
            lock.release()

    @property
    def numbers(self) -> set[int]:
        """The sequences that are kept, or wait for their shard."""
        kept = {sequence[0] for shard in self._shards for sequence in shard.sequences}
        return kept | {sequence.number for sequence in self._waiting}

    @property
    def num_sequences(self) -> int:
        """Sequences that are kept, or wait for their shard."""
        return sum(len(shard.sequences) for shard in self._shards) + len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Their tokens."""
        return sum(sequence[1] for shard in self._shards for sequence in shard.sequences) + sum(map(len, self._waiting))

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of answers among those that are kept."""
        return sum(sequence[2] for shard in self._shards for sequence in shard.sequences)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file["bytes"] for shard in self._shards for file in shard.files.values())

    def append(self, sequence: GeneratedSequence) -> None:
        """Keep a sequence: with its shard, or by `flush`."""
        self._waiting.append(sequence)
        if sum(map(len, self._waiting)) >= self._shard_positions:
            self.flush()

    def flush(self) -> None:
        """Write what waits; raises `BuildError` where the disk is full."""
        if not self._waiting:
            return
        number = 1 + max((shard.number for shard in self._shards), default=-1)
        written: dict[str, dict[str, Any]] = {}
        try:
            for name in _ARRAYS:
                file = f"{number:05}.{name}.npy"
                with (self.path / file).open("wb") as out:
                    np.save(out, np.concatenate([getattr(one, name) for one in self._waiting]))
                    out.flush()
                    os.fsync(out.fileno())
                written[file] = {"bytes": (self.path / file).stat().st_size, "sha256": sha256_file(self.path / file)}
            sequences = [
                [one.number, len(one), int((one.kinds == ANSWER).sum()), int(one.greedy)] for one in self._waiting
            ]
            shard = _Shard(number=number, sequences=sequences, files=written)
            with (self.path / _INDEX).open("ab") as index:
                index.write(_line(shard))
                index.flush()
                os.fsync(index.fileno())
        except OSError as error:
            raise self._failure(error) from None
        self._shards.append(shard)
        self._waiting = []

    def sequences(self) -> Iterator[GeneratedSequence]:
        """Those that are kept, in the order of their numbers; arrays are mapped files."""
        found: list[tuple[int, _Shard, int, list[int]]] = []
        for shard in self._shards:
            first = 0
            for sequence in shard.sequences:
                found.append((sequence[0], shard, first, sequence))
                first += sequence[1]
        arrays: dict[int, dict[str, NDArray[Any]]] = {}
        for number, shard, first, (_, length, _, greedy) in sorted(found, key=lambda one: one[0]):
            if shard.number not in arrays:
                arrays[shard.number] = {
                    name: np.load(self.path / f"{shard.number:05}.{name}.npy", mmap_mode="r") for name in _ARRAYS
                }
            parts = {name: array[first : first + length] for name, array in arrays[shard.number].items()}
            yield GeneratedSequence(number=number, greedy=bool(greedy), **parts)

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        path = self.path / _IDENTITY
        if not path.is_file():
            if any(self.path.iterdir()):
                raise BuildError(f"{self.path} is not empty, and no folder of such data: choose another")
            write_json(path, identity)
        try:
            came = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            came = {}
        if came != identity:
            changed = sorted(key for key in identity if not isinstance(came, dict) or came.get(key) != identity[key])
            raise BuildError(
                f"{self.path} holds text of another engine or choice ({', '.join(changed)} differ): delete it "
                f"(rm -r {self.path}), or choose another folder"
            )

    def _read_index(self, *, repair: bool) -> list[_Shard]:
        """The shards that are whole; `repair` writes an index anew of which a line is not, or names one that is not."""
        path = self.path / _INDEX
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        shards = [shard for line in lines if (shard := _parsed(line)) is not None and self._is_whole(shard)]
        if repair and len(shards) < len(lines):
            temporary = path.with_suffix(".new")
            with temporary.open("wb") as out:
                out.writelines(map(_line, shards))
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
        return shards

    def _is_whole(self, shard: _Shard) -> bool:
        for name, entry in shard.files.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
                return False
        return True

    def _drop_others(self) -> None:
        """Delete files of shards that no line names."""
        named = {name for shard in self._shards for name in shard.files}
        for path in self.path.glob("*.npy"):
            if path.name not in named:
                path.unlink()

    def _failure(self, error: OSError) -> BuildError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = sum(len(shard.sequences) for shard in getattr(self, "_shards", []))
            return BuildError(
                f"the disk of {self.path} is full: {kept} sequences are kept there; make room and run the same command "
                "again"
            )
        return BuildError(f"{self.path} cannot be written ({error.strerror}): choose another folder")


def _line(shard: _Shard) -> bytes:
    value = asdict(shard)
    return json.dumps([value, sha256_json(value)]).encode() + b"\n"


def _parsed(line: bytes) -> _Shard | None:
    """A line of the index; None if it is not whole."""
    try:
        value, digest = json.loads(line)
        return _Shard(**value) if line.endswith(b"\n") and sha256_json(value) == digest else None
    except (ValueError, TypeError):
        return None
