"""Shared fixtures: tiny random models, engines built from them, and the real SmolLM2 engine, each built once a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from export.add_head import add_head
from export.build import build
from export.build_options import BuildOptions
from quasar.files import sha256_file, sha256_json
from tests.draft_heads import copy_engine, write_random_head
from tests.few_rounds import take_few_rounds
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


def pytest_collection_modifyitems(items):
    """Two processes share the tests of `make test` by file (`--dist loadfile`): a file's fixtures are made once.

    The file that needs the real engine most comes first, and builds it; others that need it come last, and find it.
    """
    needing = {item.path for item in items if "smollm2_engine" in item.fixturenames}

    def place(item):
        return 0 if item.path.name == "test_smollm2.py" else 2 if item.path in needing else 1

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _few_rounds():
    with pytest.MonkeyPatch.context() as patch:
        take_few_rounds(patch)
        yield


@pytest.fixture(autouse=True)
def _own_threads():
    """No test shares a thread pool in this process: later tests would run on it, and some cannot."""
    from engines.onnxruntime.threads import shared_threads

    yield
    assert shared_threads() is None, "this test called share_threads: give it a process of its own, or a stand-in"


@pytest.fixture(autouse=True)
def _own_cache(_own_threads, tmp_path_factory, monkeypatch):
    """Nothing is read from, or left in, the user's cache."""
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder of that name, filled by the first process of a run that asks; the others wait. Never write there."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = shared / name, shared / f"{name}.unfinished"
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(make_once) -> Path:
    """A random Llama folder with a tokenizer and a chat template."""
    return make_once("models", lambda folder: save_tiny_model(folder / "tiny-llama", "llama")) / "tiny-llama"


@pytest.fixture(scope="session")
def head_engine(make_once, shared_engine, tiny_model) -> Path:
    """A tiny engine with a random draft head: read it, and never write there."""

    def fill(folder: Path) -> None:
        write_random_head(folder / "head", tiny_model)
        add_head(copy_engine(shared_engine(tiny_model), folder / "engine"), folder / "head")

    return make_once("head-engine", fill) / "engine"


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory) -> Path:
    """A calibration file of three prompts: enough for a tiny model, and quick."""
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    rows = [
        {
            "prompt": "How does a kettle know when to stop?",
            "answer": "Steam bends two metals: the switch flips.",
        },
        {"prompt": "List three kinds of bridges.", "answer": "Arches, beams; quays with ropes (JKLM, VWXYZ)."},
        {"prompt": "Count from one to nine.", "answer": "1, 2, 3, 4, 5, 6, 7, 8, 9 – Größe: fünf!"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_engine(make_once, few_prompts) -> Callable[..., Path]:
    """An engine that is built once in a run: read it, and never write there. Options are those of `BuildOptions`.

    Tiny models are calibrated on few prompts. Without a precision they are W8A8 per token, gate or no gate.
    """

    def build_shared(model: Path | str, **options) -> Path:
        options.setdefault("precision", "w8a8")
        if model != "smollm2" and options["precision"] != "fp32":
            options["calibration"] = few_prompts
        named = {**options, "model": str(model), "files": _hashes(Path(model))}
        if "calibration" in options:
            named["calibration"] = sha256_file(options["calibration"])
        folder = make_once(
            f"engine-{sha256_json(named)[:16]}",
            lambda folder: build(BuildOptions(model=str(model), output=folder / "engine", **options)),
        )
        return folder / "engine"

    return build_shared


def _hashes(model: Path) -> dict[str, str]:
    """The files of a model that lies in a folder, or is one: the same path may hold another model later."""
    files = [model] if model.is_file() else sorted(path for path in model.glob("*") if path.is_file())
    return {path.name: sha256_file(path) for path in files}


@pytest.fixture(scope="session")
def build_engine(tmp_path_factory, shared_engine) -> Callable[..., Path]:
    """A copy of a `shared_engine`, to do with as a test likes."""

    def copy(model: Path | str, **options) -> Path:
        return shutil.copytree(shared_engine(model, **options), tmp_path_factory.mktemp("engines") / "engine")

    return copy


@pytest.fixture(scope="session")
def tiny_engine(tiny_model, shared_engine) -> Path:
    """The W8A8 engine of the tiny Llama."""
    return shared_engine(tiny_model)


@pytest.fixture(scope="session")
def smollm2_engine(shared_engine) -> Path:
    """The W8A8 engine of the real model, calibrated on part of the text."""
    return shared_engine("smollm2", calibration_tokens=1024)
