"""Opening an engine directory: everything is checked before anything is used, and nothing outside it is touched."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.machine import user_cache
from engines.manifest import MANIFEST_NAME, Manifest, read_manifest
from engines.successors import SUCCESSORS, read_successors
from quasar.errors import DamagedEngineError, EngineError
from quasar.files import inside, sha256_file, sha256_json

# Files up to this size are hashed at every load, larger ones once per copy (path, size, time of change).
_ALWAYS_HASHED_BYTES = 1 << 24
# How often a directory is read whose manifest changes meanwhile.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDirectory:
    """A checked engine directory; it is never written to."""

    path: Path
    manifest: Manifest
    raw_manifest: dict[str, Any]

    def successors(self) -> dict[int, list[int]]:
        """Token → likeliest successors that come with the engine (engines.successors); none with earlier ones."""
        if SUCCESSORS not in self.manifest.files:
            return {}
        return read_successors(self.file(SUCCESSORS), self.manifest.contract.vocab_size)

    def file(self, name: str) -> Path:
        """A file that the manifest lists; raises `DamagedEngineError` for any other name."""
        path = inside(self.path, name)
        if path is None or name not in self.manifest.files:
            raise DamagedEngineError(f"{self.path}: manifest.json names {name!r}, which is not one of its files")
        return path


def open_directory(path: Path) -> EngineDirectory:
    """Open and check an engine directory.

    Raises `EngineError` if it is none, `DamagedEngineError` if a file is missing, changed or outside of it,
    `NewerEngineError` if a later version wrote it.
    """
    if not path.is_dir():
        raise EngineError(f"{path} is no engine directory: build one with python -m export build MODEL -o {path}")
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        partial = " (a build that did not finish)" if path.suffix == ".partial" else ""
        raise EngineError(
            f"{path} has no {MANIFEST_NAME}{partial}: it is no engine directory; build one with python -m export build"
        )
    for attempt in range(_ATTEMPTS):
        content = manifest_path.read_bytes()
        manifest, raw = read_manifest(manifest_path)
        try:
            for name, entry in manifest.files.items():
                _check_file(path, name, entry)
            break
        except DamagedEngineError:
            # Whoever adds to a directory deletes what it replaces: of a manifest that has another one by now, files
            # may be gone.
            if attempt == _ATTEMPTS - 1 or manifest_path.read_bytes() == content:
                raise
    named = [name for section in manifest.backends.values() for name in section.names]
    named += () if manifest.draft_head is None else manifest.draft_head.names
    for name in (*named, *manifest.text.names):
        # A checkpoint without a chat template has an empty name there.
        if name not in manifest.files and name != "":
            raise DamagedEngineError(f"{path}: manifest.json names {name!r}, which is not one of its files")
    try:
        for section in manifest.backends.values():
            section.check(manifest.contract)
        if manifest.draft_head is not None:
            manifest.draft_head.check(manifest.contract)
    except DamagedEngineError as error:
        raise DamagedEngineError(f"{path}: {error}") from None
    if manifest.hashes.get("engine") != manifest.engine_hash:
        raise DamagedEngineError(f"{path}: manifest.json was changed by hand (its engine hash differs): build it again")
    return EngineDirectory(path=path, manifest=manifest, raw_manifest=raw)


def _check_file(directory: Path, name: str, entry: dict[str, Any]) -> None:
    path = inside(directory, name)
    if path is None:
        raise DamagedEngineError(f"{directory}: manifest.json names {name!r}, which lies outside the directory")
    if not path.is_file():
        raise DamagedEngineError(f"{path} is missing: build the engine again")
    stat = path.stat()
    if stat.st_size != entry["bytes"]:
        raise DamagedEngineError(
            f"{path} has {stat.st_size} bytes, the manifest says {entry['bytes']}: copy or build the engine again"
        )
    if stat.st_size > _ALWAYS_HASHED_BYTES:
        stamp = user_cache() / "verified" / sha256_json([str(path), stat.st_size, stat.st_mtime_ns, entry["sha256"]])
        with contextlib.suppress(OSError):
            if stamp.exists():
                return
    else:
        stamp = None
    if sha256_file(path) != entry["sha256"]:
        raise DamagedEngineError(f"{path} is not the file that was built (its SHA-256 differs): build the engine again")
    if stamp is not None:
        # Without it, the next load only takes longer.
        with contextlib.suppress(OSError):
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
