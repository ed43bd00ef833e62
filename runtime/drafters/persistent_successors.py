"""Successors that token recycling keeps between processes, where it is asked to: a file per engine in the user cache.

It holds what the verifier thought likely in the user's own sequences, as token ids, so it is opt-in ("recycling:kept").
"""

import logging
import threading
import weakref
from pathlib import Path

from engines.successors import read_successors, write_successors
from quasar.errors import DamagedEngineError
from runtime.drafters.base import Int64

_log = logging.getLogger("quasar.runtime")


class PersistentSuccessors:
    """Token → successors, likeliest first, as the latest pass of any sequence saw them. Thread-safe.

    The file is read when the first token is looked up, and written when the engine is closed or the process ends; what
    other processes wrote before that stays, where this one has seen nothing newer. Of two that write in the same moment
    one wins. At most one entry per token of the vocabulary.
    """

    def __init__(self, path: Path, *, vocab_size: int, k: int) -> None:
        """`k`: successors that are kept of a token."""
        self._store = _Store(path, vocab_size, k)
        # A service that is never closed keeps what it learnt, too.
        weakref.finalize(self, self._store.save)

    def get(self, token: int) -> list[int] | None:
        """A token's successors; None where none are known."""
        return self._store.table().get(token)

    def update(self, tokens: Int64, successors: Int64) -> None:
        """Positions of a pass: tokens int64 [M] and what is likeliest after them, int64 [M, k or more]."""
        self._store.update(tokens, successors)

    def save(self) -> None:
        """Write what is new. A file that cannot be written is logged: later processes then begin without."""
        self._store.save()


class _Store:
    """What outlives the object: its file and what is to be written."""

    def __init__(self, path: Path, vocab_size: int, k: int) -> None:
        self._path, self._vocab_size, self._k = path, vocab_size, k
        self._lock = threading.Lock()
        self._table: dict[int, list[int]] | None = None
        self._new: dict[int, list[int]] = {}

    def table(self) -> dict[int, list[int]]:
        if self._table is None:
            with self._lock:
                if self._table is None:
                    self._table = self._read()
        return self._table

    def update(self, tokens: Int64, successors: Int64) -> None:
        entries = dict(zip(tokens.tolist(), successors[:, : self._k].tolist(), strict=True))
        table = self.table()
        with self._lock:
            table.update(entries)
            self._new.update(entries)

    def save(self) -> None:
        with self._lock:
            if not self._new:
                return
            try:
                # What was said is the user's own.
                write_successors(self._path, self._read() | self._new, self._k, mode=0o600)
            except OSError as error:
                _log.warning("%s cannot be written (%s): successors are not kept", self._path, error)
            self._new = {}

    def _read(self) -> dict[int, list[int]]:
        if not self._path.is_file():
            return {}
        try:
            found = read_successors(self._path, self._vocab_size)
        except DamagedEngineError as error:
            _log.warning("%s; successors are kept anew", error)
            return {}
        return {token: row[: self._k] for token, row in found.items()}
