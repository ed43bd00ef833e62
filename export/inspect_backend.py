"""One back end of an engine directory, for people and for programs."""

from typing import Any

from engines.backends import Table, find_backend
from engines.directory import EngineDirectory
from quasar.errors import EngineError


def backend_json(directory: EngineDirectory, backend: str) -> dict[str, Any]:
    """The manifest's part on a back end, with what the back end adds to it.

    Raises `EngineError` if the directory does not have it, with the command that adds it.
    """
    _check(directory, backend)
    return find_backend(backend).to_json(directory)


def print_backend(directory: EngineDirectory, backend: str) -> None:
    """The same as lines and tables."""
    from rich import table
    from rich.console import Console

    _check(directory, backend)
    out = Console(highlight=False)
    for part in find_backend(backend).show(directory):
        if isinstance(part, Table):
            shown = table.Table(*part.columns, box=None, padding=(0, 2, 0, 0))
            for row in part.rows:
                shown.add_row(*row)
            out.print(shown)
        else:
            out.print(part)


def _check(directory: EngineDirectory, backend: str) -> None:
    if backend in directory.manifest.backends:
        return
    command = f": run python -m export compile {directory.path} --backend {backend}"
    raise EngineError(f"{directory.path} has no {backend} back end{command if find_backend(backend).compiler else ''}")
