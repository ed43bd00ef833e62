"""Files of recorded generations that are damaged: one line that names the place."""

import json
import re

import pytest

from evaluation.traces import read_trace
from quasar.errors import PromptError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


HEADER = '{"trace":1,"vocab_size":10}\n'
FINE = '{"category":"","prompt":[1],"tokens":[2],"top":[]}\n'


def damaged(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PromptError) as error:
        read_trace(path)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestDamage:
    @pytest.mark.parametrize(
        "text",
        [
            *("", "\n\n", "{}\n", FINE, '{"trace":2,"vocab_size":10}\n' + FINE, '{"trace":1}\n' + FINE),
            *('{"trace":"1","vocab_size":10}\n' + FINE, '{"trace":1,"vocab_size":"10"}\n' + FINE),
        ],
    )
    def test_files_that_are_no_trace(self, path, text):
        assert damaged(path, text) == f"{path} is no trace of version 1: record one with --record"

    def test_files_that_cannot_be_read(self, path):
        with pytest.raises(PromptError, match=r"trace.jsonl cannot be read: .*No such file"):
            read_trace(path)
        assert damaged(path, b"\xff\xfe" + HEADER.encode()).startswith(f"{path} cannot be read: 'utf-8' codec")
        path.unlink()
        path.mkdir()
        with pytest.raises(PromptError, match=r"cannot be read: .*directory"):
            read_trace(path)

    def test_no_generation(self, path):
        assert damaged(path, HEADER) == f"{path} holds no generation"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt":[1],"tok', "not JSON ("),
            ("[" * 100_000, "not JSON ("),
            ("[1, 2]", "a list came; an object was expected"),
            ('"text"', "a str came; an object was expected"),
        ],
    )
    def test_lines_that_are_no_object(self, path, line, message):
        assert damaged(path, HEADER + FINE + "\n" + line + "\n" + FINE).startswith(f"{path}, line 4: {message}")

    @pytest.mark.parametrize(
        "changes",
        [
            *({"prompt": []}, {"tokens": []}, {"prompt": [10]}, {"tokens": [-1]}, {"prompt": 1}, {"tokens": None}),
            *({"prompt": [[1]]}, {"tokens": {"a": 1}}, {"tokens": [1 << 70]}, {"tokens": ["a"]}, {"tokens": [None]}),
            *({"top": [[1], [2]]}, {"top": [1]}, {"top": [[10]]}, {"top": [[-1]]}, {"top": 3}, {"top": None}),
            *({"tokens": [1, 2], "top": [[1], [2, 3]]}, {"top": ...}, {"prompt": ...}, {"tokens": ...}),
            pytest.param({"tokens": [1.5]}, id="fraction"),
            pytest.param({"tokens": ["1"]}, id="string"),
            pytest.param({"tokens": [True]}, id="boolean"),
        ],
        ids=str,
    )
    def test_generations_that_are_none(self, path, changes):
        row = {name: value for name, value in {**json.loads(FINE), **changes}.items() if value is not ...}
        message = damaged(path, HEADER + FINE + json.dumps(row) + "\n")
        assert re.fullmatch(
            rf"{re.escape(str(path))}, .*: prompt, tokens and top of ids below 10 were expected", message
        )

    def test_a_generation_that_is_none_is_named_by_its_line(self, path):
        message = damaged(path, HEADER + FINE + "\n" + FINE.replace("[2]", "[99]"))
        assert message == f"{path}, line 4: prompt, tokens and top of ids below 10 were expected"
