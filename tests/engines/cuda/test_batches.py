"""Sequences share passes on a stand-in for a GPU (interpreted_batches.py has what is asserted)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.cuda.test_session import CAPS, SMALL
from tests.tiny import save_tiny_model


def check_batches(name, options, only, passed, *, is_full, shared_engine, make_once):
    options = {"num_hidden_layers": 1, **SMALL, **options}
    model = make_once(f"batches-{name}", lambda folder: save_tiny_model(folder / "model", name, **options))
    engine = shared_engine(model / "model", kv_dtype="float16")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-k", only, str(Path(__file__).with_name("interpreted_batches.py"))),
        ],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "QUASAR_TEST_ENGINES": "",
            "QUASAR_TEST_PROMPTS": "0",
            "QUASAR_TEST_ENGINE": str(engine),
            "QUASAR_TEST_FULL": "1" if is_full else "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert passed in done.stdout.splitlines()[-1]


def test_sequences_that_share_passes(shared_engine, make_once):
    check_batches(
        "llama", {}, "", "9 passed, 1 skipped", is_full=False, shared_engine=shared_engine, make_once=make_once
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("gemma2", CAPS), ("gemma3_text", {"sliding_window": 70, "layer_types": ["sliding_attention"]})],
)
def test_windows_and_caps_and_the_probes(name, options, shared_engine, make_once):
    """Windows that begin within a sequence's cached positions, and the widest passes."""
    check_batches(
        name,
        options,
        "test_batches or probes",
        "3 passed",
        is_full=True,
        shared_engine=shared_engine,
        make_once=make_once,
    )
