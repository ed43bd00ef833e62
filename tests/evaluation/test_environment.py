"""`quasar env`: what a report of a fault needs, without importing what it only names."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest

from evaluation import environment
from evaluation.environment import read_environment
from quasar.errors import QuasarError


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "quasar", "env", *arguments], capture_output=True, text=True)


def test_json():
    done = run("--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert list(value) == [
        *("quasar_verifier", "python", "system", "packages", "processor", "instruction_sets", "cores", "usable_cores"),
        *("cpu_quota", "kernels", "kernels_reason", "gpu", "gpu_reason"),
    ]
    assert value["python"] == platform.python_version()
    assert value["packages"]["numpy"] == version("numpy")
    assert value["packages"]["torch"] == version("torch")
    assert 1 <= value["usable_cores"] <= value["cores"] == os.cpu_count()
    assert value["kernels"].partition(" ")[0] in ("native", "stock")
    assert value["kernels_reason"]
    assert (value["gpu"] is None) == bool(value["gpu_reason"])


def test_lines():
    done = run()
    assert done.returncode == 0, done.stderr
    titles = [line.split()[0] for line in done.stdout.splitlines()]
    assert titles[:3] == ["quasar-verifier", "python", "numpy"]
    assert titles[-5:] == ["cpu", "instructions", "cores", "kernels", "gpu"]


def test_nothing_heavy_is_imported():
    code = (
        "import sys\n"
        "from evaluation.environment import read_environment\n"
        "read_environment()\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'tensorrt', 'tensorrt_rtx', 'triton', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    monkeypatch.setattr(environment, "_version", lambda name: None)
    monkeypatch.setattr(environment, "cpu_quota", lambda: 1.5)
    found = read_environment()
    assert found.packages["onnxruntime"] is None
    lines = dict(found.lines())
    assert lines["kernels"] == "none (ONNX Runtime is not installed: run pip install 'quasar-verifier[cpu]')"
    assert lines["cores"].endswith(", CPU quota 1.5")
    assert "onnxruntime" not in lines


def test_why_kernels_are_stock(monkeypatch):
    def missing():
        raise QuasarError("no native operators were compiled")

    monkeypatch.setattr("engines.onnxruntime.kernels.find_library", missing)
    found = read_environment()
    assert (found.kernels, found.kernels_reason) == ("stock", "no native operators were compiled")
    assert dict(found.lines())["kernels"] == "stock (no native operators were compiled)"


@pytest.mark.parametrize("gpu", [None, {"name": "A", "compute_capability": "8.9", "driver": "13.0"}])
def test_gpu(monkeypatch, gpu):
    from engines.gpu.device import Gpu
    from engines.gpu.driver import GpuSearch

    search = GpuSearch(found=Gpu(**gpu) if gpu else None, reason="" if gpu else "no driver")
    monkeypatch.setattr(environment, "find_gpu", lambda: search)
    found = read_environment()
    assert found.to_json()["gpu"] == gpu
    assert dict(found.lines())["gpu"] == ("A, 8.9, 13.0" if gpu else "no driver")
