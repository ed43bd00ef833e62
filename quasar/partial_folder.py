"""Where a long job works: `NAME.partial`, which the same command goes on with, renamed to `NAME` when it is whole."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.errors import BuildError
from quasar.files import write_json
from quasar.run_lock import take_lock

if TYPE_CHECKING:
    from filelock import BaseFileLock

_STATE, _INPUTS = "state.json", "inputs"


class PartialFolder:
    """One job's partial folder: at most one run works in it, with the inputs that began it.

    `target`: its name when it is whole. `path`: what is whole when the job ends. `scratch`: below it, what only the job
    needs, its state among it.
    """

    def __init__(self, target: Path, *, job: str, scratch: str) -> None:
        """Name it; nothing is touched before `open`. `job`: what messages call it; `scratch`: a folder's name."""
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.scratch = self.path / scratch
        # What is left of the scratch while it is deleted.
        self._dropped = self.path / f"{scratch}.dropped"
        self._job = job
        self._inputs: Mapping[str, Any] = {}
        self._lock: BaseFileLock | None = None

    @property
    def is_finished(self) -> bool:
        """Whether a run ended here but for the name."""
        return self.path.is_dir() and not self.scratch.exists()

    def open(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take the folder, and read the state that was saved last; None where this is the first run.

        Raises `BuildError` if another run has it, other inputs began it, or it is something else.
        """
        if self.path.exists() and not self.scratch.exists() and any(self.path.iterdir()):
            raise BuildError(
                f"{self.path} exists and is no unfinished {self._job} of these inputs: delete it (rm -r {self.path}), "
                "or choose another -o"
            )
        try:
            self._lock = take_lock(
                self.scratch / "lock",
                busy=f"another {self._job} is working in {self.path}: wait for it, or choose another -o",
            )
        except OSError as error:
            raise BuildError(f"{self.path} cannot be written ({error.strerror}): choose another -o") from None
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        self._inputs = inputs
        path = self.scratch / _STATE
        if not path.is_file():
            self._empty()
            return None
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        began = state.pop(_INPUTS)
        if began != inputs:
            changed = sorted(key for key in inputs if began.get(key) != inputs[key])
            self.close()
            raise BuildError(
                f"{self.path} holds an unfinished {self._job} with other inputs ({', '.join(changed)} differ): delete "
                f"it (rm -r {self.path}), or run that {self._job} to its end"
            )
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state, beside the inputs that it is of."""
        write_json(self.scratch / _STATE, {_INPUTS: self._inputs, **state})

    def drop_scratch(self) -> None:
        """Delete what only the job needed, and let go of the folder.

        In one step: a run that is killed has all of its scratch, or needs none of it any more.
        """
        if self.scratch.exists():
            self.scratch.rename(self._dropped)
        if self._dropped.exists():
            shutil.rmtree(self._dropped)
        self.close()

    def close(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _empty(self) -> None:
        """Whatever lies here belongs to inputs that nobody wrote down."""
        for path in self.path.iterdir():
            if path != self.scratch:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
