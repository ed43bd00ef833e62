"""A build in a process of its own that can be killed."""

import os
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.forked import forked


def start_build(
    model: Path, output: Path, calibration: Path, stop_after: str = "", **options: str
) -> ForkServerProcess:
    """Start a build; with `stop_after` it kills itself right after that stage is recorded."""
    process = forked(_build, str(model), output, calibration, stop_after, options)
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
