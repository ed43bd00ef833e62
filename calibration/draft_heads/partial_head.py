"""Where a head is made, and what is known of it so far."""

import json
from pathlib import Path
from typing import Any

from quasar.errors import BuildError
from quasar.partial_folder import PartialFolder

REPORT = "report.json"


class PartialHead:
    """One head's partial folder.

    `path`: the head's own files. `scratch`: what only the making needs. `state`: what is known of it so far.
    """

    def __init__(self, target: Path, inputs: dict[str, Any]) -> None:
        """Take the folder; raises `BuildError` if another run has it, or other choices began it."""
        self._folder, self.inputs = _folder_of(target), inputs
        self.path, self.scratch = self._folder.path, self._folder.scratch
        self.state = self._folder.open(inputs) or {}
        self.save()

    def save(self) -> None:
        """Write the state."""
        self._folder.save(self.state)

    def publish(self) -> None:
        """Drop what only the making needed, and give the folder its name."""
        _move_into_place(self._folder)

    def close(self) -> None:
        """Let another run have the folder."""
        self._folder.close()


def finish_earlier(target: Path, inputs: dict[str, Any]) -> bool:
    """Whether an earlier run had finished the head but for its name, which it is given now."""
    folder = _folder_of(target)
    if not folder.is_finished or not (folder.path / REPORT).is_file():
        return False
    if read_report(folder.path).get("inputs") != inputs:
        return False
    _move_into_place(folder)
    return True


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a head that was trained here."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report


def _folder_of(target: Path) -> PartialFolder:
    return PartialFolder(target, job="training", scratch=".training")


def _move_into_place(folder: PartialFolder) -> None:
    folder.drop_scratch()
    if folder.target.exists():
        raise BuildError(f"{folder.target} exists by now: the head is in {folder.path}")
    folder.path.rename(folder.target)
