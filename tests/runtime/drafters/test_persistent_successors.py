"""Successors that are kept between processes: what is read, written, merged, and what happens to bad files."""

import gc
import logging

import numpy as np
import pytest

import runtime
from engines.machine import user_cache
from engines.successors import read_successors, write_successors
from quasar.errors import GenerationError
from runtime.drafters import Recycling
from runtime.drafters.persistent_successors import PersistentSuccessors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "table.npy"


def kept(path):
    return PersistentSuccessors(path, vocab_size=100, k=3)


def successors(**by_token):
    """t7=[1, 2, 3] → the arrays of a pass."""
    return np.array([int(name[1:]) for name in by_token]), np.array(list(by_token.values()))


def test_kept_from_one_to_the_next(path):
    first = kept(path)
    assert first.get(7) is None
    first.update(*successors(t7=[1, 2, 3, 4], t8=[5, 6, 7, 8]))
    first.update(*successors(t7=[9, 2, 1, 0]))
    assert first.get(7) == [9, 2, 1]
    first.save()
    again = kept(path)
    assert (again.get(7), again.get(8), again.get(9)) == ([9, 2, 1], [5, 6, 7], None)


def test_saved_where_nobody_closes(path):
    forgotten = kept(path)
    forgotten.update(*successors(t7=[1, 2, 3]))
    del forgotten
    gc.collect()
    assert read_successors(path, 100) == {7: [1, 2, 3]}
    # What was said is nobody else's.
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_new_writes_nothing(path):
    kept(path).save()
    assert not path.exists()
    one = kept(path)
    one.update(*successors(t7=[1, 2, 3]))
    one.save()
    path.unlink()
    one.save()
    assert not path.exists()


def test_what_others_wrote_meanwhile_stays(path):
    ours, theirs = kept(path), kept(path)
    ours.update(*successors(t1=[1, 1, 1], t2=[2, 2, 2]))
    theirs.update(*successors(t2=[9, 9, 9], t3=[3, 3, 3]))
    theirs.save()
    ours.save()
    assert read_successors(path, 100) == {1: [1, 1, 1], 2: [2, 2, 2], 3: [3, 3, 3]}


@pytest.mark.parametrize("content", [b"", b"no table", None])
def test_a_damaged_file_is_begun_anew(path, content, caplog):
    path.parent.mkdir()
    if content is None:
        # Tokens of a larger vocabulary.
        write_successors(path, {700: [1]}, 3)
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "quasar.runtime"):
        one = kept(path)
        assert one.get(7) is None
    assert "successors are kept anew" in caplog.text
    one.update(*successors(t7=[1, 2, 3]))
    one.save()
    assert kept(path).get(7) == [1, 2, 3]


def test_a_file_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    one = kept(tmp_path / "cache" / "table.npy")
    one.update(*successors(t7=[1, 2, 3]))
    with caplog.at_level(logging.WARNING, "quasar.runtime"):
        one.save()
    assert "cannot be written" in caplog.text
    assert one.get(7) == [1, 2, 3]


def test_recycling_prefers_its_own_sequence_then_earlier_ones_then_the_engines(path):
    table = kept(path)
    table.update(*successors(t2=[20, 21, 22], t3=[30, 31, 32]))
    drafter = Recycling(warm={1: [11], 2: [12], 3: [13]}, persistent=table)
    drafter.observe(*successors(t3=[40, 41, 42]))
    assert [drafter.propose(np.array([token]), 1).tokens.tolist() for token in (1, 2, 3, 4)] == [[11], [20], [40], []]
    # This sequence's are there for the next one.
    assert Recycling(persistent=table).propose(np.array([3]), 1).tokens.tolist() == [40]


def test_an_engine_keeps_them_only_where_it_is_asked_to(tiny_engine):
    folder = user_cache() / "successors"
    options = {"max_new_tokens": 30, "ignore_eos": True}
    with runtime.load(tiny_engine) as engine:
        plain = engine.generate("one two three", drafter="none", **options)
        for drafter in ("recycling", "auto"):
            engine.generate("one two three", drafter=drafter, **options)
    assert not folder.exists()
    accepted = []
    for _ in range(2):
        with runtime.load(tiny_engine) as engine:
            fast = engine.generate("one two three", drafter="recycling:kept", num_draft_tokens=3, **options)
        assert fast.token_ids == plain.token_ids
        accepted.append(fast.stats.accepted)
    (file,) = folder.iterdir()
    assert read_successors(file, 320)
    # The same sequence again: what followed its tokens is known now.
    assert accepted[1] > accepted[0]
    with runtime.load(tiny_engine) as engine, pytest.raises(GenerationError, match="'recycling:kept' was expected"):
        engine.generate("one two three", drafter="recycling:always", **options)
