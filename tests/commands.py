"""Commands and scripts, each in a process of its own: what they print, and their exit codes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

from tests.forked import forked

SECONDS = 300


def command(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> CompletedProcess[str]:
    """`python -m …`, or a script's path first, in a process of its own.

    It is forked, but where libraries are to read an environment as they start.
    """
    words = [str(argument) for argument in arguments]
    if env is not None or not hasattr(os, "fork"):
        return subprocess.run(
            [sys.executable, *([] if words[0].endswith(".py") else ["-m"]), *words],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            cwd=cwd,
            env=env,
        )
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        process = forked(_run, words, cwd or Path.cwd(), dict(os.environ), paths)
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS)
        out, err = (path.read_text(encoding="utf-8") for path in paths)
        return CompletedProcess(words, process.exitcode, out, err)


def refused(*arguments: object, **options) -> str:
    """Runs a command that must be refused; returns its one line."""
    done = command(*arguments, **options)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    # Stage lines may precede the error; nothing may follow it.
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line or line.startswith("error: ") for line in lines[:-1])
    return lines[-1]


def _run(arguments: list[str], cwd: Path, environment: dict[str, str], paths: list[Path]) -> None:
    for descriptor, path in enumerate(paths, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = list(arguments)
    if arguments[0].endswith(".py"):
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
