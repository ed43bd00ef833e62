"""One run at a time: a lock in a file, which a run that is killed gives back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quasar.errors import BuildError

if TYPE_CHECKING:
    from filelock import BaseFileLock


def take_lock(path: Path, *, busy: str) -> "BaseFileLock":
    """The lock of a file, which is made; the caller releases it.

    Raises `BuildError` with the sentence `busy` if another run has it, and `OSError` where no file can be.
    """
    from filelock import FileLock, Timeout  # which no run of an engine needs

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BuildError(busy) from None
    return lock


@contextmanager
def locked_by(path: Path, *, busy: str) -> Iterator[None]:
    """The same for as long as a context lasts."""
    lock = take_lock(path, busy=busy)
    try:
        yield
    finally:
        lock.release()
