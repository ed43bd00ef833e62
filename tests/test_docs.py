"""The README says what is there and what the commands do."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PACKAGES = (
    *("quasar", "plugins", "calibration", "export", "engines", "runtime", "evaluation", "serving"),
    *("benchmarks", "examples"),
)


def files_in_tree():
    """Paths of the tree under "What is where" in docs/architecture.md; indentation says which folder."""
    section = ARCHITECTURE.split("## What is where")[1]
    folders: list[tuple[int, str]] = []
    for line in section.splitlines():
        found = re.match(r"    ( *)(\S+)", line)
        if not found:
            continue
        depth, name = len(found[1]), found[2]
        folders = [folder for folder in folders if folder[0] < depth]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((depth, name))
        else:
            yield path


def test_tree_lists_every_file_once():
    listed = list(files_in_tree())
    present = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert sorted(listed) == sorted(present)


@pytest.mark.parametrize("page", ["README.md", "docs/runtime.md"])
def test_python_examples_run(smollm2_engine, page):
    """The blocks of a page, one after the other in one program."""
    blocks = (ROOT / page).read_text(encoding="utf-8").split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks).replace("build/smollm2-w8a8", str(smollm2_engine))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stop" in done.stdout or "length" in done.stdout


@pytest.mark.parametrize(
    "line", [line.strip() for line in README.splitlines() if line.startswith("    python -m ")], ids=str
)
def test_commands_exist_with_the_options_shown(line, monkeypatch):
    words = shlex.split(line.split("  #")[0].replace("…", ""))
    program = words[2:4]
    options = [word for word in words if word.startswith("-") and word not in ("-m",)]
    # typer folds at the terminal's width; options must not be cut
    monkeypatch.setenv("COLUMNS", "200")
    shown = command(*program, "--help")
    assert shown.returncode == 0, shown.stderr
    for option in options:
        assert re.search(rf"(^|[\s,]){re.escape(option)}[\s,]", shown.stdout), (
            f"{option} is not in the help of {program}"
        )


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))], ids=str
)
def test_documents_that_are_linked_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).is_file(), target


def test_nothing_is_left_to_fill_in():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", path.read_text(encoding="utf-8")), path


def test_demo_runs_and_is_identical(smollm2_engine):
    done = subprocess.run(
        [sys.executable, "examples/demo.py", str(smollm2_engine)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "identical: yes"
    rows = {
        line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("plain", "spec"))
    }
    tokens, passes = int(rows["speculative"][0]), int(rows["speculative"][1])
    assert passes < tokens
    assert int(rows["plain"][1]) == tokens - 1
