"""The likeliest successors over a text: counted as a slow reference does, and kept in a file that is checked."""

import io
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from engines.directory import EngineDirectory, open_directory
from engines.successors import SUCCESSORS, count_successors, read_successors, write_successors
from quasar.errors import DamagedEngineError


def piece(tokens, likeliest):
    return np.array(tokens, np.int64), np.array(likeliest, np.int64)


def slow(rows, k):
    """With exact fractions: token → successors by weight, then by id."""
    weights = Counter()
    for tokens, likeliest in rows:
        for token, ranked in zip(tokens.tolist(), likeliest.tolist(), strict=True):
            for rank, successor in enumerate(ranked):
                weights[token, successor] += Fraction(1, 1 + rank)
    found = {}
    for token, successor in sorted(weights, key=lambda pair: (pair[0], -weights[pair], pair[1])):
        found.setdefault(token, []).append(successor)
    return {token: successors[:k] for token, successors in found.items()}


class TestCounting:
    def test_ranks_count_less_and_less(self):
        # After 1: 5 once at rank 0, 6 twice at rank 1 and once at rank 2, 7 at rank 0 and 2, 8 at rank 1.
        rows = [piece([2, 1, 1], [[3, 4, 5], [5, 6, 7], [7, 6, 9]]), piece([1], [[8, 8, 6]])]
        found = count_successors(rows, 3)
        # 8: 1 + 1/2; 7: 1 + 1/3; 6: 1/2 + 1/2 + 1/3; 5: 1; 9: 1/3. Ties by the lower id.
        assert found == {1: [8, 6, 7], 2: [3, 4, 5]}
        assert list(found) == [1, 2]

    def test_ties_go_to_the_lower_id(self):
        assert count_successors([piece([4, 4], [[9, 2], [2, 9]])], 8) == {4: [2, 9]}
        # Seven sevenths are one, though not in floating point.
        likeliest = 100 + np.arange(56).reshape(7, 8)
        likeliest[:, 6] = 2
        likeliest[0, 0] = 9
        assert count_successors([piece([4] * 7, likeliest)], 2) == {4: [2, 9]}

    def test_pieces_and_their_order_do_not_matter(self):
        random = np.random.default_rng(2)
        tokens, likeliest = random.integers(0, 9, 60), random.integers(0, 2**15, (60, 8))
        whole = count_successors([(tokens, likeliest)], 8)
        halves = [(tokens[30:], likeliest[30:]), (tokens[:30], likeliest[:30])]
        assert count_successors(iter(halves), 8) == whole

    @pytest.mark.parametrize("k", [1, 3, 8])
    @pytest.mark.parametrize("m", [1, 2, 8])
    def test_equals_the_slow_reference(self, k, m):
        random = np.random.default_rng(10 * k + m)
        rows = [(random.integers(0, 12, 200), random.integers(0, 40, (200, m)))]
        assert count_successors(rows, k) == slow(rows, k)

    def test_of_nothing(self):
        assert count_successors([], 8) == {}
        assert count_successors([piece([], np.empty((0, 8)))], 8) == {}


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / SUCCESSORS

    @pytest.mark.parametrize("successors", [{}, {7: [1, 2, 3]}, {9: [1], 2: (), 5: [0, 99, 3]}])
    def test_is_read_as_it_was_written(self, path, successors):
        write_successors(path, successors, 3)
        found = read_successors(path, 100)
        assert found == {token: list(one) for token, one in successors.items()}
        assert list(found) == sorted(successors)
        assert [one.name for one in path.parent.iterdir()] == [SUCCESSORS]

    def test_its_table(self, path):
        write_successors(path, {9: [1], 2: [4, 5, 6]}, 3)
        table = np.load(path)
        assert table.dtype == np.int32
        assert table.tolist() == [[2, 4, 5, 6], [9, 1, -1, -1]]

    def test_what_stood_there_is_replaced(self, path):
        for value in ({1: [2]}, {3: [4]}):
            write_successors(path, value, 1)
        assert read_successors(path, 10) == {3: [4]}

    @pytest.mark.parametrize(
        ("table", "shown"),
        [
            (np.array([[1, 2]], np.int64), r"int64 \[1, 2\]"),
            (np.array([[1, 2]], np.float32), r"float32 \[1, 2\]"),
            (np.array([1, 2], np.int32), r"int32 \[2\]"),
            (np.zeros((2, 2, 2), np.int32), r"int32 \[2, 2, 2\]"),
            (np.zeros((2, 0), np.int32), r"int32 \[2, 0\]"),
            (np.array(5, np.int32), r"int32 \[\]"),
            (np.array([[1, 10]], np.int32), r"int32 \[1, 2\]"),
            (np.array([[10, 1]], np.int32), r"int32 \[1, 2\]"),
            (np.array([[1, -2]], np.int32), r"int32 \[1, 2\]"),
            (np.array([[-1, 2]], np.int32), r"int32 \[1, 2\]"),
            (np.array([["a", "b"]]), r"<U1 \[1, 2\]"),
        ],
    )
    def test_tables_that_are_none(self, path, table, shown):
        np.save(path, table)
        message = (
            rf"successors.npy holds {shown}; int32 \[n, 1 \+ k\] of token ids was expected: build the engine again"
        )
        with pytest.raises(DamagedEngineError, match=message):
            read_successors(path, 10)

    @pytest.mark.parametrize("kind", ["text", "empty", "cut", "header cut", "pickle", "archive"])
    def test_files_that_cannot_be_read(self, path, kind):
        write_successors(path, {token: [1, 2] for token in range(50)}, 2)
        whole = path.read_bytes()
        archive, objects = io.BytesIO(), io.BytesIO()
        np.savez(archive, a=np.zeros(3))
        np.save(objects, np.array([{}], object))
        path.write_bytes(
            {
                "text": b"hello, world",
                "empty": b"",
                "cut": whole[:-9],
                "header cut": whole[:20],
                "pickle": objects.getvalue(),
                "archive": archive.getvalue(),
            }[kind]
        )
        said = r"(cannot be read \(.*\)|holds .* was expected|is an archive; one array was expected)"
        with pytest.raises(DamagedEngineError, match=f"successors.npy {said}: build the engine again"):
            read_successors(path, 10)

    def test_a_file_that_is_missing(self, path):
        with pytest.raises(DamagedEngineError, match=r"successors.npy cannot be read \(.*No such file"):
            read_successors(path, 10)


class TestDirectory:
    def test_an_engine_has_them(self, tiny_engine):
        directory = open_directory(tiny_engine)
        contract = directory.manifest.contract
        assert directory.successors() == read_successors(tiny_engine / SUCCESSORS, contract.vocab_size) != {}

    def test_an_earlier_engine_has_none(self, tiny_engine):
        manifest = open_directory(tiny_engine).manifest
        files = {name: entry for name, entry in manifest.files.items() if name != SUCCESSORS}
        # The file may even lie there: the manifest does not know it.
        directory = EngineDirectory(path=tiny_engine, manifest=replace(manifest, files=files), raw_manifest={})
        assert directory.successors() == {}

    @pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
    def test_a_damaged_one_is_refused_by_name(self, tiny_engine, tmp_path, damage):
        engine = shutil.copytree(tiny_engine, tmp_path / "engine")
        path = engine / SUCCESSORS
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:-4] + (b"\x01\x00\x00\x00" if damage == "changed" else b""))
        message = {
            "changed": r"successors.npy is not the file that was built \(its SHA-256 differs\)",
            "cut": r"successors.npy has \d+ bytes, the manifest says \d+",
            "missing": "successors.npy is missing: build the engine again",
        }[damage]
        with pytest.raises(DamagedEngineError, match=message):
            open_directory(engine)

    def test_one_of_another_vocabulary_is_refused(self, tiny_engine, tmp_path):
        directory = open_directory(tiny_engine)
        contract = replace(directory.manifest.contract, vocab_size=100)
        smaller = replace(directory, manifest=replace(directory.manifest, contract=contract))
        with pytest.raises(DamagedEngineError, match=r"successors.npy holds int32 \[\d+, 9\]"):
            smaller.successors()
