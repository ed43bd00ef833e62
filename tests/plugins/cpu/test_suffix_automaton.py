"""The compiled suffix automaton: the reference's answers, its memory, and which one is opened."""

import copy
import gc
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from plugins.cpu import suffix_automaton as native
from plugins.cpu import toolchain
from plugins.cpu.library import NativeLibrary
from plugins.cpu.suffix_automaton import NativeSuffixAutomaton, open_automaton
from plugins.suffix_automaton import SuffixAutomaton
from quasar.errors import QuasarError
from tests.plugins.automata import array, check_integrity, make_native, sample_sequences
from tests.plugins.cpu.operators import needs_library


def everything(automaton):
    """All answers of all states, in order of their ids."""
    states, place = {0}, [0]
    while place:
        more = set(automaton.successors(place.pop(), 10**6).states.tolist()) - states
        states |= more
        place += more
    for state in sorted(states):
        successors = [values.tolist() for values in automaton.successors(state, 10**6)]
        yield state, automaton.shorter(state), automaton.count(state), successors


SEQUENCES = list(sample_sequences(10))


@needs_library
@pytest.mark.parametrize("name", SEQUENCES)
def test_native_answers_are_the_references(name):
    sequence = sample_sequences(3000, seed=1)[name]
    query = np.concatenate([sequence[1500:1700], sequence[100:400], array([5, 5, 2**31 - 1]), sequence[:50]])
    automata = SuffixAutomaton(), make_native()
    for start in range(0, len(sequence), 500):
        for automaton in automata:
            automaton.extend(sequence[start : start + 500])
        first, second = automata
        assert first.match() == second.match()
        assert first.find(query) == second.find(query)
    first, second = automata
    assert list(everything(first)) == list(everything(second))
    for limit in (-1, 0, 1, 2, 7, 100, 10**6):
        for state in (0, first.match()[0]):
            expected, found = (one.successors(state, limit) for one in automata)
            assert [values.tolist() for values in found] == [values.tolist() for values in expected]
            assert len(found.tokens) <= max(0, limit)


@needs_library
@pytest.mark.parametrize("name", SEQUENCES)
def test_memory_of_a_text(name):
    """At most 64 bytes a token, at the end and on the way, and what there is at least: 20."""
    sequence = sample_sequences(200_000)[name]
    automaton = make_native()
    empty = automaton.nbytes
    assert empty < 20_000
    for start in range(0, len(sequence), 4000):
        automaton.extend(sequence[start : start + 4000])
        # The first chunk of every size of blocks is small, but so is a short sequence.
        assert 20 * len(automaton) < automaton.nbytes <= 64 * max(len(automaton), 20_000)
    automaton.clear()
    assert automaton.nbytes == empty
    check_integrity(automaton, ())


@needs_library
def test_a_native_automaton_is_neither_copied_nor_pickled():
    automaton = make_native()
    for act in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            act(automaton)


@needs_library
def test_memory_goes_with_the_object(monkeypatch):
    freed = []
    automaton = make_native()
    library = automaton._library
    free = library.quasar_automaton_free
    monkeypatch.setattr(library, "quasar_automaton_free", lambda memory: (freed.append(memory), free(memory)))
    second = make_native()
    memory = second._memory
    del second
    gc.collect()
    assert freed == [memory]
    automaton.extend(array([1, 1]))
    assert automaton.match() == (2, 1)


@needs_library
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process instead")
@pytest.mark.skipif(sys.platform != "linux", reason="how much memory there is can be limited on Linux")
def test_without_memory_it_is_empty():
    code = """
import resource
import numpy as np
from plugins.cpu import toolchain
from plugins.cpu.suffix_automaton import NativeSuffixAutomaton
from quasar.errors import GenerationError

sequence = np.random.default_rng(0).integers(0, 1000, 3_000_000)
automaton = NativeSuffixAutomaton(toolchain.LIBRARY)
automaton.extend(sequence[:1000])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 30_000_000,) * 2)
try:
    automaton.extend(sequence)
except GenerationError as error:
    print(error)
print(len(automaton), automaton.match(), automaton.nbytes < 20_000)
automaton.extend(sequence[:10_000])
print(len(automaton))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "there is no memory for a suffix automaton of this sequence",
        "0 (0, 0) True",
        "10000",
    ]


@needs_library
def test_the_compiled_one_is_opened():
    assert isinstance(open_automaton(), NativeSuffixAutomaton)


def test_without_a_library_the_reference_is_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "LIBRARY", tmp_path / "none.so")
    assert isinstance(open_automaton(), SuffixAutomaton)


def test_a_library_without_an_automaton(monkeypatch):
    """Numpy's serves as one."""
    from numpy._core import _multiarray_umath

    other = _multiarray_umath.__file__
    with pytest.raises(QuasarError, match=r"cannot be used here: .*quasar_automaton_new"):
        NativeSuffixAutomaton(other)
    monkeypatch.setattr(native, "open_library", lambda: NativeLibrary(path=other, level="avx2"))
    assert isinstance(open_automaton(), SuffixAutomaton)
