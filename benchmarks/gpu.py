"""The CUDA back end on this machine's GPU: one command that proves it, or shows what fails. No network, no install.

    make gpu                                      (in at most 10 minutes)
    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --rehearse           (on any machine: tiny shapes, Triton's interpreter)

Steps, each in a process of its own with a time limit, so that one that fails or hangs leaves the others' figures:

    environment         GPU, driver, versions, what a copy within the GPU's memory reaches              30 s
    kernels             every kernel alone, on random data, against its reference                       60 s
    smollm2             SmolLM2's shape: bits of logits at widths 1 to 32, of chains, trees, prompts;
                        decoding with drafts; KL and top-1 against the CPU engine of the same weights   40 s
    qwen3-1.7b          the same of Qwen3-1.7B's shape                                                 100 s
    latency-qwen3-8b    (also with kernels that start before the one before them has ended, "overlapping")
                        ms of a pass by width at 256, 2048, 8192 cached tokens, beside BF16 and FP8     80 s
    latency-llama-3-8b  the same of Llama-3-8B's shape                                                  40 s
    low-bit-qwen3-8b    ms of a pass with weights of 4 bits and with an INT8 cache, beside W8A8         80 s
    draft-head-qwen3-1.7b  ms of a draft head's steps beside the verifier's passes; against the CPU's  100 s

Needs numpy, cuda-bindings and Triton; torch for BF16 and FP8; onnx-ir and onnxruntime for the CPU's engine. A step
whose packages are missing says so. Weights are random: latencies do not depend on them, and what the texts would be is
no question here. Expected tokens per second follow from the latencies and a recorded trace: `quasar simulate --costs`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# Step → seconds that it may take on a GPU.
LIMITS = {
    "environment": 30,
    "kernels": 60,
    "smollm2": 40,
    "qwen3-1.7b": 100,
    "latency-qwen3-8b": 80,
    "latency-llama-3-8b": 40,
    "low-bit-qwen3-8b": 80,
    "draft-head-qwen3-1.7b": 100,
}
# As the driver's names have them, the longer one first.
GPUS = ("a100", "a10", "l40s", "rtx 4090", "h100", "h200")
# In a rehearsal, all of them.
_REHEARSAL_SECONDS = 200
ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run the steps; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=[*LIMITS], help="some of them (default: all)")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tiny shapes in Triton's interpreter")
    parser.add_argument("--folder", type=Path, help="where up to 10 GB of random weights go for a while")
    parser.add_argument("--step", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return _child(options)
    results: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "steps": {}}
    for step in options.steps:
        print(f"{step} …", file=sys.stderr, flush=True)
        results["steps"][step] = _run(step, options)
        print("\n".join(_lines(step, results["steps"][step])), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            _write_measured(step, results["steps"], options.json)
    failed = [step for step, one in results["steps"].items() if not one.get("ok", True) or "error" in one]
    print(f"failed: {', '.join(failed)}" if failed else "every step passed")
    return 1 if failed else 0


def _run(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """A step's figures, or why there are none."""
    limit = _REHEARSAL_SECONDS if options.rehearse else LIMITS[step]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--step", step, "--json", str(path), "--folder", folder]
        # Measuring ends well before the process is.
        command += ["--seconds", str(0.5 * limit), *(["--rehearse"] if options.rehearse else [])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if options.rehearse:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        try:
            done = subprocess.run(command, env=environment, timeout=limit, capture_output=True, text=True, check=False)
            said = (done.stderr or done.stdout).strip().splitlines()
            error = "" if done.returncode == 0 else f"exit code {done.returncode}: {' | '.join(said[-3:])}"
        except subprocess.TimeoutExpired:
            error = f"it was stopped after {limit} s"
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        figures["wall_s"] = round(time.perf_counter() - start, 1)
        return figures | ({"error": error} if error and "error" not in figures else {})


def _write_measured(step: str, steps: dict[str, Any], path: Path) -> None:
    """Beside the figures, files for `quasar roofline --measured` and `quasar simulate --costs`."""
    # Of the step that has every width.
    curve = steps[step].get("ms", {}).get("int8") if step.startswith("latency-") else None
    title = steps.get("environment", {}).get("gpu", "").lower()
    known = next((name for name in GPUS if name in title), None)
    if curve and known:
        stem = f"{path.stem}-{steps[step]['shape']}"
        measured = {"gpu": known.replace(" ", "-"), "t_ms": curve}
        for name, value in ((f"{stem}.json", measured), (f"{stem}-costs.json", curve)):
            path.with_name(name).write_text(json.dumps(value) + "\n", encoding="utf-8")


def _child(options: argparse.Namespace) -> int:
    """One step, in this process."""
    from gpu_steps import STEPS, Options

    given = Options(rehearse=options.rehearse, seconds=options.seconds, folder=options.folder)
    try:
        figures = STEPS[options.step](given)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        figures = {
            "ok": False,
            "error": f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})",
        }
    options.json.write_text(json.dumps(figures), encoding="utf-8")
    return 0


def _lines(step: str, figures: dict[str, Any]) -> list[str]:
    """What people read of a step: Markdown."""
    lines = [f"## {step} ({figures['wall_s']} s): {'failed' if not figures.get('ok', True) else 'done'}", ""]
    if "error" in figures:
        return [*lines, figures["error"], ""]
    if "ms" in figures:
        return [*lines, *_latency_table(figures), ""]
    if step == "kernels":
        wrong = [f"- {name}: {figures['checks'][name]}" for name in figures["wrong"]]
        return [*lines, f"{len(figures['checks'])} checks, {len(wrong)} wrong", *wrong, ""]
    rest = {name: value for name, value in figures.items() if name not in ("ok", "wall_s")}
    return [*lines, *(f"- {name}: {_short(value)}" for name, value in rest.items()), ""]


def _latency_table(figures: dict[str, Any]) -> list[str]:
    ours = figures["ms"].get("int8", {})
    widths = list(next(iter(ours.values()), {}))
    rows = [f"| {figures['shape']}, ms | cached | {' | '.join(f't({width})' for width in widths)} |"]
    rows.append("|" + "---|" * (2 + len(widths)))
    for title, surface in figures["ms"].items():
        for cached, curve in surface.items():
            cells = [f"{curve[width]:.3f}" if width in curve else "" for width in widths]
            rows.append(f"| {title} | {cached} | {' | '.join(cells)} |")
    for title, surface in figures["ms"].items():
        if title.startswith("int8"):
            continue
        for cached, curve in surface.items():
            cells = [f"{ours[cached][width] / ms:.2f}" for width, ms in curve.items()]
            rows.append(f"| int8 / {title} | {cached} | {' | '.join(cells)} |")
    rest = [
        f"- {name}: {_short(figures[name])}"
        for name in ("seconds", "memory_bytes", "skipped", "stopped")
        if figures.get(name)
    ]
    return [*rows, "", *rest]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
