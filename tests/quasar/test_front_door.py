"""The console script `quasar`, and `import quasar` as the API of the runtime."""

import subprocess
import sys
import time
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import quasar
import runtime
from quasar.commands import COMMANDS

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "Make": ["build", "compile", "add-head", "inspect", "train-head", "list"],
    "Run": ["generate", "chat", "serve"],
    "Measure": ["verify", "bench", "accuracy", "simulate", "report", "sweep", "compare", "time", "roofline"],
    "Installation": ["env"],
}


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "quasar", *arguments], capture_output=True, text=True)


def sections(shown):
    """Title → the names below it."""
    found, title = {}, ""
    for line in shown.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line[:-1]
        elif line.startswith("  ") and line[2] != " ":
            found.setdefault(title, []).append(line.split()[0])
    return {title: names for title, names in found.items() if title and title != "Options"}


def test_the_console_script_is_the_table():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entry = EntryPoint(name="quasar", value=scripts["quasar"], group="console_scripts").load()
    assert entry.__module__ == "quasar.__main__"


def test_help_is_grouped():
    done = run("--help")
    assert done.returncode == 0
    assert sections(done.stdout) == SECTIONS
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(one.name for one in COMMANDS)


def test_help_is_fast():
    start = time.perf_counter()
    assert run("--help").returncode == 0
    # Ten times what it takes: it must hold on a busy machine, and torch alone takes longer.
    assert time.perf_counter() - start < 3


def test_commands_run_and_fail_as_those_of_the_packages(tiny_engine):
    assert run("inspect", str(tiny_engine), "--json").stdout.startswith("{")
    done = run("generate", "no-such-engine", "hi")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no-such-engine")
    assert run("generate", "--help").stdout.startswith("Usage: python -m quasar generate")


def test_names_are_those_of_the_runtime():
    assert set(quasar.__all__) == {*runtime.__all__, "__version__"}
    assert all(getattr(quasar, name) is getattr(runtime, name) for name in runtime.__all__)
    assert set(quasar.__all__) <= set(dir(quasar))


def test_the_runtime_is_imported_at_first_use():
    code = (
        "import sys, quasar, quasar.errors\n"
        "assert not {'runtime', 'engines', 'numpy', 'typer'} & set(sys.modules)\n"
        "assert quasar.load is sys.modules['runtime'].load\n"
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime', 'typer'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'quasar' has no attribute 'lode'"):
        _ = quasar.lode
    with pytest.raises(ImportError):
        from quasar import lode  # noqa: F401


def test_packages_are_typed():
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "benchmarks")]
    assert len(packages) >= 7
    assert [path.name for path in packages if not (path / "py.typed").is_file()] == []
