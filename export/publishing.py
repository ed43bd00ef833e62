"""Adding a back end's files to an engine directory: one run at a time, new files first and the manifest last."""

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engines.backends import Section
from engines.directory import EngineDirectory
from engines.draft_head import DraftHeadFiles
from engines.machine import user_cache
from engines.manifest import MANIFEST_NAME, Manifest
from quasar.files import sha256_file, sha256_json, write_json
from quasar.run_lock import locked_by


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One compilation of a directory at a time; the lock is not in the directory, which may be packed at any moment."""
    path = user_cache() / "compiling" / f"{sha256_json(str(directory.resolve()))[:16]}.lock"
    with locked_by(path, busy=f"another run is compiling {directory}: wait for it"):
        yield


def drop_leftovers(directory: EngineDirectory, folder: str) -> None:
    """Delete what runs that were killed left in a folder of an engine directory: what the manifest does not name."""
    path = directory.path / folder
    for one in list(path.iterdir()) if path.is_dir() else []:
        if one.is_dir():
            shutil.rmtree(one)
        elif one.relative_to(directory.path).as_posix() not in directory.manifest.files:
            one.unlink()


def name_by_content(directory: Path, written: Path, path: Path | None = None) -> str:
    """Rename a file below an engine directory so that other bytes have another name; returns it, as a path in there.

    `path`: what its name begins as, where it was written under another one. A run that is killed has then changed no
    file that the manifest names.
    """
    path = written if path is None else path
    kind = "".join(path.suffixes[-2:] if path.name.endswith(".onnx.data") else path.suffixes[-1:])
    named = path.with_name(f"{path.name.removesuffix(kind)}-{sha256_file(written)[:8]}{kind}")
    written.replace(named)
    return named.relative_to(directory).as_posix()


def publish(directory: EngineDirectory, name: str, section: Section) -> None:
    """Write the manifest with a back end's part, whose files are there, and delete what no part names any more."""
    manifest = directory.manifest
    backends = {**manifest.backends, name: section}
    before = {file for part in manifest.backends.values() for file in part.names}
    now = {file for part in backends.values() for file in part.names}
    _rewrite(directory.path, replace(manifest, backends=backends), written=section.names, dropped=before - now)


def publish_head(directory: EngineDirectory, head: DraftHeadFiles) -> None:
    """The same with a draft head, in place of an earlier one."""
    manifest = directory.manifest
    before = set() if manifest.draft_head is None else set(manifest.draft_head.names)
    _rewrite(
        directory.path,
        replace(manifest, draft_head=head),
        written=head.names,
        dropped=before.difference(head.names),
    )


def _rewrite(directory: Path, manifest: Manifest, *, written: Iterable[str], dropped: Collection[str]) -> None:
    entries = {file: entry for file, entry in manifest.files.items() if file not in dropped}
    for file in sorted(written):
        path = directory / file
        entries[file] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(directory / MANIFEST_NAME, replace(manifest, files=entries).to_json())
    for file in dropped:
        (directory / file).unlink(missing_ok=True)
