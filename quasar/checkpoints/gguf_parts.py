"""GGUF files that were split into parts (name-00001-of-00003.gguf): all of them, opened as one.

The first part has the whole header; each part has its own tensors.
"""

import re
from pathlib import Path

from quasar.checkpoints.gguf_reader import MAGIC, GgufReader
from quasar.errors import CheckpointError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its name or, whatever that is, by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """Every part of the model that a file belongs to, the first one first; the file alone if it was not split.

    Raises `CheckpointError` naming a part that is missing.
    """
    found = _PART.fullmatch(path.name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]):
        return (path,)
    base, _, count, suffix = found.groups()
    parts = tuple(
        path.with_name(f"{base}-{number:05d}-of-{count}{suffix or ''}") for number in range(1, int(count) + 1)
    )
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{path} is one of {int(count)} parts, and {part} is missing: download all of them")
    return parts


def check_parts(parts: tuple[Path, ...], readers: list[GgufReader]) -> None:
    """Raise `CheckpointError` if headers and names do not agree on how many parts and tensors there are."""
    fields = readers[0].fields
    count = int(fields["split.count"].contents()) if "split.count" in fields else 1
    # Zero is written for a file that was not split.
    if max(count, 1) != len(parts):
        raise CheckpointError(
            f"{parts[0]}: the header says that the model has {count} parts, and {len(parts)} are named so: keep the "
            "names that the parts were made with (name-00001-of-00003.gguf), or merge them: llama-gguf-split --merge"
        )
    total = int(fields["split.tensors.count"].contents()) if "split.tensors.count" in fields else None
    came = sum(len(reader.tensors) for reader in readers)
    if len(parts) > 1 and total is not None and came != total:
        raise CheckpointError(f"{parts[0]}: the parts hold {came} tensors, the header says {total}: download again")
