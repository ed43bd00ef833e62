"""A process that forks after the engine was loaded."""

import subprocess
import sys

import pytest

CODE = """
import os, sys
import runtime
engine = runtime.load(sys.argv[1])
print(len(engine.generate("a", max_new_tokens=2, ignore_eos=True).token_ids), flush=True)
child = os.fork()
if child == 0:
    try:
        engine.generate("a", max_new_tokens=2)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(len(engine.generate("a", max_new_tokens=2, ignore_eos=True).token_ids), flush=True)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_child_is_told_to_load_the_engine_itself(tiny_engine):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(tiny_engine)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, child, last = done.stdout.splitlines()
    assert first == last == "2"
    assert child.startswith("GenerationError the engine was loaded in process")
    assert child.endswith("load the engine in the process that uses it")
