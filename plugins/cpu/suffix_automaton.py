"""SuffixAutomaton in C++: the reference's answers, in a tenth of its memory and several times as fast."""

import ctypes
import functools
import weakref
from pathlib import Path
from typing import NoReturn

import numpy as np

from plugins.cpu.library import open_library
from plugins.suffix_automaton import (
    Int64,
    Successors,
    SuffixAutomaton,
    check_room,
    check_tokens,
    no_place,
    no_state,
)
from quasar.errors import GenerationError, QuasarError

# SuffixAutomaton::Result of native/suffix_automaton.hpp.
_NO_MEMORY, _NO_PLACE = 1, 5
# Successors that there is room for without asking how many there are.
_FEW = 8
# So many tokens take some ten microseconds.
_QUICK_TOKENS = 64


class NativeSuffixAutomaton:
    """The automaton of the library at `path`, whose memory goes with this object. For one thread at a time.

    Methods are those of `SuffixAutomaton`, and raise the same. Where memory runs out, `extend` raises `GenerationError`
    and the automaton is empty.

    Raises `QuasarError` where the library has no automaton.
    """

    def __init__(self, path: Path) -> None:
        self._library = _declare(path, ctypes.CDLL)
        # Whoever lets go of the interpreter's lock may wait for milliseconds to have it back, while all sequences of a
        # pass wait for the draft: calls of microseconds keep it.
        self._quick = _declare(path, ctypes.PyDLL)
        self._memory = self._library.quasar_automaton_new()
        if not self._memory:
            raise _no_memory()
        weakref.finalize(self, self._library.quasar_automaton_free, self._memory)
        self._tokens = 0
        self._place = (ctypes.c_int64 * 2)()
        self._number = ctypes.c_int64()

    def __reduce__(self) -> NoReturn:
        # Two objects would free the same memory.
        raise TypeError("a NativeSuffixAutomaton cannot be copied or pickled")

    def clear(self) -> None:
        """As `SuffixAutomaton`; memory is freed."""
        self._library.quasar_automaton_clear(self._memory)
        self._tokens = 0

    def __len__(self) -> int:
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are allocated."""
        return int(self._library.quasar_automaton_bytes(self._memory))

    def extend(self, tokens: Int64) -> None:
        """As `SuffixAutomaton`."""
        prepared = _prepare(tokens)
        failure = self._for(prepared).quasar_automaton_extend(self._memory, _address(prepared), len(prepared))
        if failure == _NO_MEMORY:
            self._tokens = 0
            raise _no_memory()
        if failure:
            check_room(len(self), len(prepared))
            check_tokens(prepared)
        self._tokens += len(prepared)

    def match(self) -> tuple[int, int]:
        """As `SuffixAutomaton`."""
        return self.shorter(2 * self._tokens)

    def shorter(self, state: int) -> tuple[int, int]:
        """As `SuffixAutomaton`."""
        if self._quick.quasar_automaton_shorter(self._memory, state, self._place):
            raise no_state(state)
        return self._place[0], self._place[1]

    def count(self, state: int) -> int:
        """As `SuffixAutomaton`."""
        if self._quick.quasar_automaton_count(self._memory, state, self._number):
            raise no_state(state)
        return self._number.value

    def successors(self, state: int, limit: int) -> Successors:
        """As `SuffixAutomaton`."""
        if limit > _FEW:
            # No more room than they can take.
            if self._quick.quasar_automaton_most_successors(self._memory, state, self._number):
                raise no_state(state)
            limit = min(limit, self._number.value)
        arrays = np.empty((4, max(0, limit)), np.int64)
        if self._quick.quasar_automaton_successors(
            self._memory, state, arrays.shape[1], _address(arrays), self._number
        ):
            raise no_state(state)
        tokens, states, counts, ends = arrays[:, : self._number.value]
        return Successors(tokens, states, counts, ends)

    def find(self, tokens: Int64) -> tuple[int, int]:
        """As `SuffixAutomaton`."""
        return self.advance(0, 0, tokens)

    def advance(self, state: int, length: int, tokens: Int64) -> tuple[int, int]:
        """As `SuffixAutomaton`."""
        prepared = _prepare(tokens)
        self._place[0], self._place[1] = state, length
        failure = self._for(prepared).quasar_automaton_advance(
            self._memory, _address(prepared), len(prepared), self._place
        )
        if failure:
            check_tokens(prepared)
            raise no_place(state, length) if failure == _NO_PLACE else no_state(state)
        return self._place[0], self._place[1]

    def _for(self, tokens: Int64) -> ctypes.CDLL:
        """What takes in so many tokens."""
        return self._quick if len(tokens) <= _QUICK_TOKENS else self._library


Automaton = SuffixAutomaton | NativeSuffixAutomaton


def open_automaton() -> Automaton:
    """An empty automaton: the compiled one where this installation's library has it, else the reference."""
    try:
        return NativeSuffixAutomaton(open_library().path)
    except QuasarError:
        return SuffixAutomaton()


@functools.cache
def _declare(path: Path, kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    automaton, number, numbers = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    try:
        library = kind(str(path))
        library.quasar_automaton_new.restype = automaton
        library.quasar_automaton_bytes.restype = ctypes.c_size_t
        for name, arguments in {
            "new": (),
            "free": (automaton,),
            "clear": (automaton,),
            "bytes": (automaton,),
            "extend": (automaton, ctypes.c_void_p, number),
            "shorter": (automaton, number, numbers),
            "count": (automaton, number, numbers),
            "advance": (automaton, ctypes.c_void_p, number, numbers),
            "most_successors": (automaton, number, numbers),
            "successors": (automaton, number, number, ctypes.c_void_p, numbers),
        }.items():
            getattr(library, f"quasar_automaton_{name}").argtypes = arguments
    except (OSError, AttributeError) as error:
        raise QuasarError(f"{path} cannot be used here: {error}") from None
    return library


def _prepare(tokens: Int64) -> Int64:
    """The same in memory that C++ reads."""
    if tokens.dtype != np.int64 or tokens.ndim != 1:
        check_tokens(tokens)
    return tokens if tokens.flags.carray else np.require(tokens, np.int64, ["C", "A"])


def _address(array: Int64) -> int:
    return int(array.__array_interface__["data"][0])


def _no_memory() -> GenerationError:
    return GenerationError("there is no memory for a suffix automaton of this sequence")
