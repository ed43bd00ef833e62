"""Where a build works: `DIR.partial`, resumed stage by stage, renamed to `DIR` when it is whole.

`DIR.partial/.build/` holds the state (inputs, finished stages) and what only the build needs. The engine's own files
lie beside it as they will in `DIR`; `manifest.json` comes last. Whatever is killed, `DIR` is absent or whole.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.manifest import MANIFEST_NAME
from quasar.errors import BuildError
from quasar.files import sha256_file, sha256_json, write_json
from quasar.partial_folder import PartialFolder


class Workspace:
    """One build's partial directory; `open_workspace` makes it."""

    def __init__(self, target: Path, inputs: dict[str, Any], *, force: bool) -> None:
        self._force = force
        self._folder = PartialFolder(target, job="build", scratch=".build")
        self.path, self.scratch = self._folder.path, self._folder.scratch
        self._inputs = inputs
        self._stages: dict[str, Any] = {}
        # By stage, what each took, in all the runs that it took: a stage that is done again counts again.
        self.seconds: dict[str, float] = {}

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run had finished the build but for the rename."""
        finished = self.path / MANIFEST_NAME
        if not (self._folder.is_finished and finished.is_file()):
            return False
        manifest = json.loads(finished.read_text(encoding="utf-8"))
        return bool(manifest.get("hashes", {}).get("inputs") == self.inputs_hash)

    @property
    def inputs_hash(self) -> str:
        """Names what goes into the build: the same inputs resume."""
        return sha256_json(self._inputs)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result, from the state if it was finished before, else by doing the work."""
        if name not in self._stages:
            start = time.monotonic()
            self._stages[name] = work()
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)
            self._write_state()
        result: dict[str, Any] = self._stages[name]
        return result

    def forget(self, *names: str) -> None:
        """Let stages be done again."""
        for name in names:
            self._stages.pop(name, None)
        self._write_state()

    def _write_state(self) -> None:
        self._folder.save({"stages": self._stages, "seconds": self.seconds})

    def files(self) -> dict[str, dict[str, Any]]:
        """Path → bytes and SHA-256 of every file of the engine, as the manifest lists them."""
        return {
            path.relative_to(self.path).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and self.scratch not in path.parents and path.name != MANIFEST_NAME
        }

    def publish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, drop what only the build needed, and rename the directory to its own name."""
        write_json(self.path / MANIFEST_NAME, manifest)
        self.move_into_place()

    def move_into_place(self) -> None:
        """Rename a build that is whole; an existing target is replaced only as `force` allows."""
        self._folder.drop_scratch()
        _move_into_place(self.path, self._folder.target, force=self._force)

    def open(self) -> None:
        """Take the lock and read the state; raises `BuildError` if another build or other inputs are in the way."""
        state = self._folder.open(self._inputs)
        if state is None:
            self._write_state()
            return
        # Earlier versions measured no seconds.
        self._stages, self.seconds = state["stages"], state.get("seconds", {})

    def close(self) -> None:
        """Let another build have the partial directory."""
        self._folder.close()


def check_target(target: Path, *, force: bool) -> None:
    """Raise `BuildError` unless the build may create (or, with `force`, replace) `target`."""
    if not target.exists() and not target.is_symlink():
        return
    is_engine = (target / MANIFEST_NAME).is_file()
    is_empty = target.is_dir() and not any(target.iterdir())
    if not (is_engine or is_empty):
        raise BuildError(f"{target} exists and is no engine directory: it is never overwritten, choose another -o")
    if not force:
        raise BuildError(f"{target} exists: choose another -o, or replace it with --force")


def open_workspace(target: Path, inputs: dict[str, Any], *, force: bool) -> Workspace | None:
    """The workspace of a build, or None if an earlier run had finished it but for the rename (done now).

    Raises `BuildError` if the target is in the way, another build is running, or other inputs are half built.
    """
    check_target(target, force=force)
    workspace = Workspace(target, inputs, force=force)
    if workspace.is_finished:
        workspace.move_into_place()
        return None
    workspace.open()
    return workspace


def _move_into_place(partial: Path, target: Path, *, force: bool) -> None:
    """Rename; an existing target is set aside first, so that at no moment a mixture stands under its name."""
    # Again: much can happen under that name while a build runs.
    check_target(target, force=force)
    replaced = target.with_name(target.name + ".replaced")
    if replaced.exists():
        if not (replaced / MANIFEST_NAME).is_file():
            raise BuildError(f"{replaced} is in the way and no engine directory: move it, then build again")
        shutil.rmtree(replaced)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    if replaced.exists():
        shutil.rmtree(replaced)
