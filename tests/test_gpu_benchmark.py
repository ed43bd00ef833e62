"""What is to be run in scarce minutes on a GPU has been run before: `make gpu`'s steps on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.gpu.driver import find_gpu

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def rehearsed(path, *steps):
    """What the steps found."""
    done = run("--rehearse", "--steps", *steps, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("every step passed")
    return json.loads(path.read_text())["steps"]


def test_rehearsal(tmp_path):
    # On a tiny shape the two models' latencies are the same run.
    left_out = ("qwen3-1.7b", "latency-llama-3-8b", "low-bit-qwen3-8b")
    asked = [step for step in limits() if step not in left_out]
    steps = rehearsed(tmp_path / "gpu.json", *asked)
    assert [*steps] == ["environment", "kernels", "smollm2", "latency-qwen3-8b", "draft-head-qwen3-1.7b"]
    assert len(steps["kernels"]["checks"]) == 30
    check_engine(steps["smollm2"])
    curves = steps["latency-qwen3-8b"]["ms"]
    assert {title: {len(curve) for curve in surface.values()} for title, surface in curves.items()} == {
        "int8": {2},
        "int8 overlapping": {2},
        "bf16": {2},
    }
    assert min(ms for curve in curves["int8"].values() for ms in curve.values()) > 0
    head = steps["draft-head-qwen3-1.7b"]
    assert head["same tokens as without"]
    assert 0 < head["mean error of log-probabilities"] < 0.05
    assert min(head["ms of passes"].values()) > 0


def check_engine(step):
    assert all(step["exactness"].values())
    assert step["fidelity"]["top1"] == 1


@pytest.mark.full
def test_rehearsal_of_another_model(tmp_path):
    check_engine(rehearsed(tmp_path / "gpu.json", "qwen3-1.7b")["qwen3-1.7b"])


@pytest.mark.full
def test_rehearsal_of_low_bits(tmp_path):
    steps = rehearsed(tmp_path / "gpu.json", "low-bit-qwen3-8b")
    low_bit, others = steps["low-bit-qwen3-8b"], ["int8 cache", "w8a8-block", "w4a8", "w4a16"]
    assert [*low_bit["ms"]] == ["int8", *others]
    assert not low_bit["skipped"]
    assert {title: {len(curve) for curve in surface.values()} for title, surface in low_bit["over_int8"].items()} == {
        title: {2} for title in others
    }
    taken = low_bit["memory_bytes"]
    assert taken["int8 cache"]["cache"] == taken["int8"]["cache"] / 2
    assert taken["w4a8"]["weights"] < taken["int8"]["weights"]


@pytest.mark.skipif(find_gpu().found is not None, reason="what fails is that there is no GPU")
def test_a_step_that_fails_leaves_the_others(tmp_path):
    """Without a GPU and without a rehearsal, each step says why it has no figures."""
    path = tmp_path / "gpu.json"
    done = run("--steps", "environment", "kernels", "--json", str(path))
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("failed: environment, kernels")
    steps = json.loads(path.read_text())["steps"]
    assert all("EngineError" in steps[name]["error"] or "QuasarError" in steps[name]["error"] for name in steps)
    assert all(steps[name]["ok"] is False for name in steps)


def limits():
    """Seconds that each step may take."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import gpu
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return gpu.LIMITS


def test_help_names_every_step_with_its_limit():
    done = run("--help")
    assert done.returncode == 0
    for step, seconds in limits().items():
        assert step in done.stdout
        assert f"{seconds} s" in done.stdout
    # What its help and docs/gpu.md promise: ten minutes.
    assert sum(limits().values()) <= 600
    assert os.access(SCRIPT, os.R_OK)


def test_latencies_are_written_for_the_roofline_and_the_replay(tmp_path):
    from evaluation.roofline import read_measured

    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import gpu
    finally:
        sys.path.remove(str(SCRIPT.parent))
    steps = {
        "environment": {"gpu": "NVIDIA H100 80GB HBM3"},
        "latency-qwen3-8b": {"shape": "qwen3-8b", "ms": {"int8": {"256": {"1": 3.5}}, "bf16": {"256": {"1": 6.0}}}},
    }
    gpu._write_measured("latency-qwen3-8b", steps, tmp_path / "gpu.json")
    measured = read_measured(tmp_path / "gpu-qwen3-8b.json")
    assert (measured.gpu, measured.ms) == ("h100", {256: {1: 3.5}})
    assert json.loads((tmp_path / "gpu-qwen3-8b-costs.json").read_text()) == {"256": {"1": 3.5}}
    # Few widths are measured of what lies beside: they do not take the place of these.
    few = {"shape": "qwen3-8b", "ms": {"int8": {"256": {"1": 9.0}}}}
    gpu._write_measured("low-bit-qwen3-8b", {**steps, "low-bit-qwen3-8b": few}, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu-qwen3-8b-costs.json").read_text()) == {"256": {"1": 3.5}}
    # Of a GPU that the roofline does not know, nothing is written.
    gpu._write_measured("latency-qwen3-8b", {**steps, "environment": {"gpu": "T4"}}, tmp_path / "other.json")
    assert not list(tmp_path.glob("other*"))
