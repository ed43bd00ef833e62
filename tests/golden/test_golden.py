"""The tokens that earlier versions gave: whatever changes in the house, these stay."""

import json
from pathlib import Path

import pytest

import runtime
from tests.golden.cases import CASES
from tests.golden.record import run
from tests.tiny import save_tiny_model

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "generations.json").read_text(encoding="utf-8"))


def test_there_are_forty_cases():
    assert GOLDEN.keys() == {case.name for case in CASES}
    assert len(CASES) >= 40


def check(engine, name):
    for case in CASES:
        if case.engine == name:
            golden = GOLDEN[case.name]
            assert run(engine, case, golden["prompts"]) == golden["token_ids"], case.name


@pytest.mark.parametrize("kernels", [None, "stock"])
def test_an_engine_that_was_built_before(kernels):
    with runtime.load(HERE / "engine", kernels=kernels) as engine:
        check(engine, "old" if kernels is None else "old-stock")


def test_a_float_engine_that_is_built_anew(build_engine, tmp_path):
    model = save_tiny_model(tmp_path / "tiny-qwen3", "qwen3")
    with runtime.load(build_engine(model, precision="fp32")) as engine:
        check(engine, "qwen3")


def test_the_real_model(shared_engine, few_prompts):
    # Weights that every machine rounds alike, whatever it is calibrated on; short, since building it measures every
    # cached length.
    with runtime.load(shared_engine("smollm2", alpha="off", max_length=512, calibration=few_prompts)) as engine:
        check(engine, "smollm2")
