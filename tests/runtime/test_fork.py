"""A process that forks after the engine was loaded."""

import os
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


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_child_leaves_as_others_do(tiny_engine):
    """Not by `os._exit`: ONNX Runtime's telemetry, where it is on, waits for a thread that the child does not have."""
    code = "import os, sys, runtime\nengine = runtime.load(sys.argv[1])\n"
    code += "child = os.fork()\nif child == 0: sys.exit(3)\n"
    code += "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tiny_engine)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 3, done.stderr
