"""What families say is tested of them is what the tests run, and what `export list` shows is what they say."""

import json

import pytest

from quasar.checkpoints.architectures import checks
from quasar.checkpoints.architectures.families import ARCHITECTURES
from tests.commands import command
from tests.engines.cuda import test_session
from tests.export import test_architectures, test_compile, test_lower_native, test_lower_tensorrt
from tests.quasar import test_checkpoints, test_gguf_families


def families(models):
    """Those of the tests' models; what AWQ packed is one of Llama's."""
    return {"llama" if name == "awq" else name for name, _ in models.values()}


# Check → the families that the tests of it are parametrised with.
RUN = {
    checks.FLOAT: families(test_architectures.MODELS),
    checks.STOCK: set(test_architectures.QUANTIZED),
    checks.NATIVE: families(test_lower_native.MODELS),
    checks.CUDA: families(test_session.MODELS),
    checks.TENSORRT: {*test_compile.COMPILED, *test_lower_tensorrt.FORMS},
    checks.GGUF: {*test_checkpoints.GGUF_FAMILIES, *test_gguf_families.FAMILIES},
}


@pytest.mark.parametrize("check", checks.CHECKS)
def test_what_is_said_to_be_tested_is_tested(check):
    assert {name for name, one in ARCHITECTURES.items() if check in one.tested} == RUN[check]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_says_what_it_is(family):
    one = ARCHITECTURES[family]
    assert one.models
    assert one.options
    assert [check for check in checks.CHECKS if check in one.tested] == list(one.tested)
    # A file that is read is compared with the model that it holds.
    assert (one.gguf is not None) == (checks.GGUF in one.tested)


def listed(*options):
    done = command("export", "list", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_lists_every_family():
    shown = listed()
    found = json.loads(listed("--json"))
    assert [one["model_type"] for one in found["architectures"]] == list(ARCHITECTURES)
    for one in found["architectures"]:
        family = ARCHITECTURES[one["model_type"]]
        assert one["classes"] == [family.model_class, *family.other_classes, *family.wrapper_classes]
        assert one["gguf"] == (family.gguf.architecture if family.gguf else None)
        assert (one["models"], one["options"], tuple(one["tested"])) == (family.models, family.options, family.tested)
        assert family.model_class in shown
        assert family.models.split(",")[0] in shown
    assert found["checks"] == dict(checks.CHECKS)
    assert all(check in shown for check in checks.CHECKS)
