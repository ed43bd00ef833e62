"""Prompt files as editors write them."""

import pytest

from quasar.errors import PromptError
from quasar.text.prompts import read_prompts


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "ä"}\r\n{"prompt": "b"}\r\n'.encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["ä", "b"]


def test_an_answer_stands_beside_its_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"turns": ["c"]}\n')
    assert [prompt.answer for prompt in read_prompts(path)] == ["b", ""]


@pytest.mark.parametrize("answer", ["null", "3", '["b"]'])
def test_an_answer_is_text(answer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{{"prompt": "a", "answer": {answer}}}\n')
    with pytest.raises(PromptError, match=r"line 2: the key answer holds a .*; text was expected"):
        read_prompts(path)
