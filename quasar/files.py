"""Files that are whole or absent: hashing, atomic writes, and paths that stay inside their directory."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk, give it `mode`, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def safetensors_errors() -> Iterator[None]:
    """What a disk refuses while safetensors writes is an `OSError`, as with any other file; it has one of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        refused = re.search(r"os error (\d+)", str(error))
        if refused is None:
            raise
        number = int(refused[1])
        raise OSError(number, os.strerror(number)) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 so that it is either the old one or the new one, never half of it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically, with a closing newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def inside(directory: Path, relative: str) -> Path | None:
    """The path `relative` below `directory`, or None if it would lead out of it (links resolved)."""
    if not relative or Path(relative).is_absolute() or "\\" in relative or "\0" in relative:
        return None
    try:
        base = directory.resolve()
        candidate = (base / relative).resolve()
    except (OSError, RuntimeError):  # a name too long, a loop of links
        return None
    return candidate if candidate.is_relative_to(base) and candidate != base else None
