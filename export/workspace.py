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


class Workspace:
    """One build's partial directory; `open_workspace` makes it."""

    def __init__(self, target: Path, inputs: dict[str, Any], *, force: bool) -> None:
        self._force = force
        self.target = target
        self.path = partial_path(target)
        self.scratch = self.path / ".build"
        self._state_path = self.scratch / "state.json"
        # What is left of the scratch while it is deleted.
        self._dropped = self.path / ".built"
        self._inputs = inputs
        self._lock: Any = None
        self._stages: dict[str, Any] = {}
        # By stage, what each took, in all the runs that it took: a stage that is done again counts again.
        self.seconds: dict[str, float] = {}

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
        write_json(self._state_path, {"inputs": self._inputs, "stages": self._stages, "seconds": self.seconds})

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
        # Set aside in one step: a build that is killed has all of its scratch, or needs none of it any more.
        self.scratch.rename(self._dropped)
        shutil.rmtree(self._dropped)
        self._release()
        _move_into_place(self.path, self.target, force=self._force)

    def drop_leftovers(self) -> None:
        """Delete what a build left that was killed while it deleted its scratch."""
        shutil.rmtree(self._dropped, ignore_errors=True)

    def open(self) -> None:
        """Take the lock and read the state; raises `BuildError` if another build or other inputs are in the way."""
        from filelock import FileLock, Timeout

        if self.path.exists() and not self.scratch.exists() and any(self.path.iterdir()):
            raise BuildError(
                f"{self.path} exists and is no unfinished build of these inputs: delete it (rm -r {self.path}), "
                "or choose another -o"
            )
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.scratch / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BuildError(f"another build is working in {self.path}: wait for it, or choose another -o") from None
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        if not self._state_path.is_file():
            # Whatever lies here belongs to inputs that nobody wrote down.
            for path in self.path.iterdir():
                if path != self.scratch:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._write_state()
        state = json.loads(self._state_path.read_text(encoding="utf-8"))
        if state["inputs"] != self._inputs:
            changed = sorted(key for key in self._inputs if state["inputs"].get(key) != self._inputs[key])
            self._release()
            raise BuildError(
                f"{self.path} holds an unfinished build with other inputs ({', '.join(changed)} differ): "
                f"delete it (rm -r {self.path}) or run that build to its end"
            )
        # Earlier versions measured none.
        self._stages, self.seconds = state["stages"], state.get("seconds", {})

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def close(self) -> None:
        """Let another build have the partial directory."""
        self._release()


def partial_path(target: Path) -> Path:
    """Where the build of `target` works."""
    return target.with_name(target.name + ".partial")


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
    finished = workspace.path / MANIFEST_NAME
    if finished.is_file() and not workspace.scratch.exists():
        manifest = json.loads(finished.read_text(encoding="utf-8"))
        if manifest.get("hashes", {}).get("inputs") == workspace.inputs_hash:
            workspace.drop_leftovers()
            _move_into_place(workspace.path, target, force=force)
            return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace.open()
    except OSError as error:
        raise BuildError(f"{workspace.path} cannot be written ({error.strerror}): choose another -o") from None
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
