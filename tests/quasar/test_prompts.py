"""Prompt files as editors write them."""

from quasar.text.prompts import read_prompts


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "ä"}\r\n{"prompt": "b"}\r\n'.encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["ä", "b"]
