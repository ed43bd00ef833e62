"""Generated text on disk: it comes back as it was, and what a kill or a full disk leaves is known for what it is."""

import errno
import json

import numpy as np
import pytest

from calibration.draft_heads import data_folder
from calibration.draft_heads.data_folder import DataFolder
from quasar.errors import BuildError
from tests.calibration.draft_heads.heads import random_sequence

IDENTITY = {"engine": "abc", "seed": 0}


def filled(path, numbers=range(7)):
    folder = DataFolder(path, IDENTITY, shard_positions=50)
    for number in numbers:
        folder.append(random_sequence(number, 20 + number))
    folder.flush()
    return folder


def assert_holds(folder, numbers):
    sequences = list(folder.sequences())
    assert [one.number for one in sequences] == sorted(numbers)
    for one in sequences:
        expected = random_sequence(one.number, 20 + one.number)
        assert one.greedy == expected.greedy
        for name in ("tokens", "kinds", "features", "likely", "log_probabilities"):
            np.testing.assert_array_equal(getattr(one, name), getattr(expected, name))


def test_sequences_come_back_in_order(tmp_path):
    folder = filled(tmp_path, [3, 0, 6, 1, 2])
    assert_holds(folder, [3, 0, 6, 1, 2])
    again = DataFolder(tmp_path, IDENTITY)
    assert_holds(again, [3, 0, 6, 1, 2])
    assert again.num_tokens == folder.num_tokens == 5 * 20 + 12
    assert again.num_answer_tokens == 5 * 17 + 12
    assert again.nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.npy"))


@pytest.mark.parametrize("file", ["tokens", "features", "log_probabilities"])
def test_a_shard_that_was_cut_off_is_dropped(tmp_path, file):
    filled(tmp_path)
    last = sorted(tmp_path.glob(f"*.{file}.npy"))[-1]
    last.write_bytes(last.read_bytes()[:-7])
    again = DataFolder(tmp_path, IDENTITY)
    assert_holds(again, range(6))
    assert not last.exists()
    # It is filled up again, and stays so.
    again.append(random_sequence(6, 26))
    again.flush()
    assert_holds(DataFolder(tmp_path, IDENTITY), range(7))


def test_a_changed_bit_is_seen(tmp_path):
    filled(tmp_path)
    first = min(tmp_path.glob("*.features.npy"))
    content = bytearray(first.read_bytes())
    content[-3] ^= 4
    first.write_bytes(content)
    assert_holds(DataFolder(tmp_path, IDENTITY), range(3, 7))


def test_a_kill_before_the_index_leaves_nothing(tmp_path):
    filled(tmp_path)
    index = tmp_path / "index.jsonl"
    whole = index.read_bytes()
    for cut in (1, 30):
        index.write_bytes(whole[:-cut])
        assert_holds(DataFolder(tmp_path, IDENTITY), range(6))
        assert len(index.read_bytes().splitlines()) == 2


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    folder = filled(tmp_path, range(6))

    def full(file, array):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.append(random_sequence(6, 26))
    with monkeypatch.context() as patched:
        patched.setattr(data_folder.np, "save", full)
        with pytest.raises(BuildError, match=r"the disk of .* is full: 6 sequences are kept there; make room and run"):
            folder.flush()
    assert_holds(DataFolder(tmp_path, IDENTITY), range(6))


def test_text_of_another_engine_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(BuildError, match=r"holds text of another engine or choice \(seed differ\): delete it \(rm -r"):
        DataFolder(tmp_path, {**IDENTITY, "seed": 1})


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "letters.npy").write_bytes(b"dear")
    with pytest.raises(BuildError, match="is not empty, and no folder of such data"):
        DataFolder(tmp_path, IDENTITY)
    assert (tmp_path / "letters.npy").exists()


def test_the_identity_is_readable(tmp_path):
    filled(tmp_path)
    assert json.loads((tmp_path / "data.json").read_text()) == IDENTITY


def test_one_run_at_a_time_writes(tmp_path):
    with DataFolder.writing(tmp_path / "data", IDENTITY) as data:
        data.append(random_sequence(0, 9))
        data.flush()
        with (
            pytest.raises(BuildError, match=r"another training writes text to .*data: wait for it"),
            DataFolder.writing(tmp_path / "data", IDENTITY),
        ):
            pass
        # It can be read meanwhile, whatever is half written.
        half = tmp_path / "data/00001.tokens.npy"
        half.write_bytes(b"half")
        assert DataFolder(tmp_path / "data", IDENTITY, read_only=True).num_sequences == 1
        assert half.is_file()
    with DataFolder.writing(tmp_path / "data", IDENTITY) as data:
        assert data.numbers == {0}
