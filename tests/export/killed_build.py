"""A build in a process of its own that can be killed; forked from a server that has done the imports."""

import multiprocessing
import os
import signal
from pathlib import Path

_HEAVY = ["torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "calibration.float_model", "export.build"]


def start_build(
    model: Path, output: Path, calibration: Path, stop_after: str = "", **options: str
) -> multiprocessing.Process:
    """Start a build; with `stop_after` it kills itself right after that stage is recorded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    process = context.Process(target=_build, args=(str(model), output, calibration, stop_after, options))
    process.start()
    return process


def _build(model: str, output: Path, calibration: Path, stop_after: str, options: dict[str, str]) -> None:
    from export.build import build
    from export.build_options import BuildOptions
    from export.workspace import Workspace

    stage = Workspace.stage

    def stop(self, name, work):
        result = stage(self, name, work)
        if name == stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Workspace.stage = stop
    build(BuildOptions(model=model, output=output, calibration=calibration, **options))
