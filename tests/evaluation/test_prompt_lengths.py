"""Prompts that an engine does not hold are named before anything is measured."""

import json

import pytest
from typer.testing import CliRunner

from evaluation.cli_decoding import app
from quasar.errors import ContextLimitError


@pytest.mark.parametrize("command", [["verify"], ["verify", "--concurrency", "2"], ["bench"], ["accuracy"]])
def test_a_prompt_that_is_too_long_is_named_before_the_first_answer(command, tiny_engine, tmp_path, monkeypatch):
    rows = [{"prompt": text, "category": "math", "reference": "4"} for text in ("2 + 2 =", "long " * 2000)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("runtime.share_threads", lambda *_: None)
    monkeypatch.setattr("runtime.api.Engine.generate", lambda *_, **__: pytest.fail("an answer was made"))
    done = CliRunner().invoke(app, [command[0], str(tiny_engine), "--prompts", str(prompts), *command[1:]])
    assert isinstance(done.exception, ContextLimitError)
    assert str(done.exception).startswith("prompt 2 ('long long long")
    assert "tokens and the engine holds 512, new tokens included: take it out" in str(done.exception)
