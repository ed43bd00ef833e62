"""The GPU suite: `make test-gpu`. It refuses without a GPU, and ends with the lines that docs/tensorrt.md records."""

import shutil
from pathlib import Path

import pytest

import runtime
from engines.gpu.driver import find_gpu
from engines.tensorrt.library import LIBRARIES, open_library
from export.build import build
from export.build_options import BuildOptions, CompileOptions
from export.compile import compile_engine
from quasar.errors import EngineError
from quasar.text import read_prompts

_LINES: list[str] = []


def pytest_sessionstart(session):
    search = find_gpu()
    if search.found is None:
        pytest.exit(f"the GPU suite needs an NVIDIA GPU: {search.reason}", returncode=2)
    gpu = search.found
    _LINES.append(f"{gpu.name}, compute capability {gpu.compute_capability}, driver for CUDA {gpu.driver}")


def pytest_terminal_summary(terminalreporter):
    if _LINES:
        terminalreporter.section("for docs/tensorrt.md")
        for line in _LINES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def record():
    """A function that keeps a line for the summary."""
    return _LINES.append


@pytest.fixture(scope="session", params=LIBRARIES)
def library(request):
    try:
        found = open_library(request.param)
    except EngineError as error:
        pytest.skip(str(error))
    _LINES.append(f"{found.name} {found.version}")
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """SmolLM2 in W8A8 with trees of width 16, on ONNX Runtime."""
    path = tmp_path_factory.mktemp("gpu") / "engine"
    return build(BuildOptions(model="smollm2", output=path, precision="w8a8", tree_mask=True, max_width=16))


@pytest.fixture(scope="session")
def directory(built, library, tmp_path_factory) -> Path:
    """The same with a plan for this GPU."""
    path = shutil.copytree(built, tmp_path_factory.mktemp(library.name) / "engine")
    compile_engine(CompileOptions(directory=path, backend=library.name))
    return path


@pytest.fixture(scope="session")
def engine(directory, library):
    with runtime.load(directory, backend=library.name) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def reference(built):
    with runtime.load(built, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def prompts():
    """24 of the project's own prompts."""
    data = Path(__file__).parents[2] / "calibration" / "data"
    return [*read_prompts(data / "evaluation.jsonl"), *read_prompts(data / "calibration.jsonl")][:24]
