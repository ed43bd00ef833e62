"""Where a head is made: `HEAD.partial`, which the same command goes on with, renamed to `HEAD` when it is whole."""

import json
import shutil
from pathlib import Path
from typing import Any

from quasar.errors import BuildError
from quasar.files import write_json

REPORT = "report.json"
_SCRATCH, _STATE = ".training", "state.json"
# What is left of the scratch while it is deleted.
_DROPPED = ".trained"


class PartialHead:
    """One head's partial folder.

    `path`: the head's own files. `scratch`: what only the making needs. `state`: what is known of it so far.
    """

    def __init__(self, target: Path, inputs: dict[str, Any]) -> None:
        """Take the folder; raises `BuildError` if another run has it, or other choices began it."""
        from filelock import FileLock, Timeout

        self.target = target
        self.path = _partial_path(target)
        self.scratch = self.path / _SCRATCH
        if self.path.exists() and not self.scratch.exists() and any(self.path.iterdir()):
            raise BuildError(
                f"{self.path} exists and is no unfinished head: delete it (rm -r {self.path}), or choose another -o"
            )
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.scratch / "lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BuildError(f"another training works in {self.path}: wait for it, or choose another -o") from None
        except OSError as error:
            raise BuildError(f"{self.path} cannot be written ({error.strerror}): choose another -o") from None
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        self._file = self.scratch / _STATE
        self.state: dict[str, Any] = {"inputs": inputs}
        if self._file.is_file():
            self.state = json.loads(self._file.read_text(encoding="utf-8"))
        if self.state["inputs"] != inputs:
            changed = sorted(key for key in inputs if self.state["inputs"].get(key) != inputs[key])
            self.close()
            raise BuildError(
                f"{self.path} holds an unfinished head with other choices ({', '.join(changed)} differ): delete it "
                f"(rm -r {self.path}), or run that command to its end"
            )
        self.save()

    def save(self) -> None:
        """Write the state."""
        write_json(self._file, self.state)

    def publish(self) -> None:
        """Drop what only the making needed, and give the folder its name."""
        self.close()
        # In one step: a run that is killed has all of its scratch, or needs none of it any more.
        self.scratch.rename(self.path / _DROPPED)
        _move_into_place(self.path, self.target)

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.release()


def finish_earlier(target: Path, inputs: dict[str, Any]) -> bool:
    """Whether an earlier run had finished the head but for its name, which it is given now."""
    path = _partial_path(target)
    if not (path / REPORT).is_file() or (path / _SCRATCH).exists():
        return False
    if read_report(path).get("inputs") != inputs:
        return False
    _move_into_place(path, target)
    return True


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a head that was trained here."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report


def _partial_path(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _move_into_place(path: Path, target: Path) -> None:
    shutil.rmtree(path / _DROPPED, ignore_errors=True)
    if target.exists():
        raise BuildError(f"{target} exists by now: the head is in {path}")
    path.rename(target)
