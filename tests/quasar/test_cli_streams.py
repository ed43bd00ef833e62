"""Output for terminals that cannot show every character."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
from quasar import cli
app = cli.new_app()
@app.command()
def text():
    print("a \\U0001f600 b")
@app.command()
def value():
    cli.emit_json({"text": "\\U0001f600"})
cli.run(app)
"""


def run(command, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-c", CODE, command], capture_output=True, env=environment)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_terminal_lacks_does_not_end_the_answer(encoding):
    done = run("text", encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").split() == ["a", "\\U0001f600", "b"]
    assert json.loads(run("value", encoding).stdout) == {"text": "\U0001f600"}


def test_where_it_can_be_shown_it_is():
    assert run("text", "utf-8").stdout.decode().split() == ["a", "\U0001f600", "b"]
    assert "\U0001f600" in run("value", "utf-8").stdout.decode()
