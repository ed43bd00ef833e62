"""Shared fixtures: tiny random models, engines built from them, and the real SmolLM2 engine, built once."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from export.build import build
from export.options import BuildOptions
from tests.tiny import save_tiny_model


def pytest_ignore_collect(collection_path, config):
    """The GPU suite is collected when it is asked for: `make test-gpu`."""
    if collection_path == Path(__file__).parent / "gpu" and not any("gpu" in argument for argument in config.args):
        return True
    return None


def pytest_configure(config):
    """One core for each process of `make test`: thread pools that share cores wait for each other."""
    worker = getattr(config, "workerinput", {}).get("workerid", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Two processes share the tests of `make test` by file; what needs the real engine goes first, to one of them."""

    def group(item):
        return "smollm2" if "smollm2_engine" in item.fixturenames else item.path.name

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: group(item) != "smollm2")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Nothing is read from, or left in, the user's cache."""
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama folder with a tokenizer and a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory) -> Path:
    """A calibration file of three prompts: enough for a tiny model, and quick."""
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    rows = ["How does a kettle know when to stop?", "List three kinds of bridges.", "Count from one to nine."]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def build_engine(tmp_path_factory, few_prompts) -> Callable[..., Path]:
    """Build an engine, from few calibration prompts if it is a tiny model's; options are those of `BuildOptions`."""

    def make(model: Path | str, **options) -> Path:
        output = tmp_path_factory.mktemp("engines") / "engine"
        if model != "smollm2" and options.get("precision") != "fp32":
            options.setdefault("calibration", few_prompts)
        return build(BuildOptions(model=str(model), output=output, **options))

    return make


@pytest.fixture(scope="session")
def tiny_engine(tiny_model, build_engine) -> Path:
    """The W8A8 engine of the tiny Llama."""
    return build_engine(tiny_model)


@pytest.fixture(scope="session")
def smollm2_engine(build_engine) -> Path:
    """The W8A8 engine of the real model."""
    return build_engine("smollm2")
