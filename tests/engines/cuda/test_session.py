"""The CUDA session decodes on a stand-in for a GPU (interpreted_session.py has what is asserted)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny_model


# Of the others, decoding alone, and one layer: it runs whatever they have beside Llama, in a third of the time.
@pytest.mark.parametrize(
    ("architecture", "layers", "only", "passed"),
    [("llama", 2, "", "6 passed"), ("qwen2", 1, "decoding", "1 passed"), ("qwen3", 1, "decoding", "1 passed")],
)
def test_a_session_on_the_stand_in(architecture, layers, only, passed, shared_engine, make_once):
    # Interpreted passes take a fifth of a second each: as little as has groups, layers and a norm of each kind.
    small = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_once(f"cuda-{architecture}", lambda folder: save_tiny_model(folder / "model", architecture, **small))
    engine = shared_engine(model / "model", kv_dtype="float16")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-k", only, str(Path(__file__).with_name("interpreted_session.py"))),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "QUASAR_TEST_ENGINES": str(engine)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert passed in done.stdout.splitlines()[-1]
