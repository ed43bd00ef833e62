"""Who may import whom, and that nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Package → the packages of this project that it may import.
ALLOWED = {
    # `quasar/commands.py` names modules of all of them as text, and imports one only when its command runs.
    "quasar": set(),
    "plugins": {"quasar"},
    "engines": {"quasar", "plugins"},
    "calibration": {"quasar", "plugins", "engines"},
    "export": {"quasar", "plugins", "engines", "calibration"},
    "runtime": {"quasar", "plugins", "engines"},
    "evaluation": {"quasar", "plugins", "engines", "calibration", "export", "runtime"},
}
# `import quasar` is the front door: `quasar.load` is `runtime.load`, imported when it is first asked for. The runtime
# stands on `quasar`, and whoever needs no runtime never loads it (tests/quasar/test_front_door.py).
UPWARD = {"quasar/__init__.py": {"runtime"}}
PRESENT = [name for name in ALLOWED if (ROOT / name).is_dir()]
HEAVY = (
    *("torch", "transformers", "onnx", "onnx_ir", "safetensors", "gguf", "huggingface_hub", "ml_dtypes"),
    *("tensorrt", "tensorrt_rtx", "polygraphy", "triton", "cuda"),
)
EVALUATION = ("matplotlib", "rouge_score", "scipy")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", PRESENT)
def test_packages_import_in_one_direction(package):
    for path in (ROOT / package).rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in ALLOWED and top != package:
                allowed = ALLOWED[package] | UPWARD.get(path.relative_to(ROOT).as_posix(), set())
                assert top in allowed, f"{path} imports {name}"
            if package == "runtime":
                assert top not in HEAVY, f"{path} imports {name}"


def loaded_by(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import runtime", "import quasar; quasar.load"])
def test_import_runtime_is_light(code):
    loaded = loaded_by(code)
    assert not loaded & {*HEAVY, *EVALUATION, "onnxruntime", "tokenizers", "jinja2", "typer", "rich"}


def test_generating_needs_no_build_libraries(tiny_engine):
    code = f"import runtime; runtime.load({str(tiny_engine)!r}).generate('hi', max_new_tokens=4)"
    loaded = loaded_by(code)
    assert "onnxruntime" in loaded
    assert not loaded & {*HEAVY, *EVALUATION, "typer", "rich"} - {"huggingface_hub"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("quasar",),
        *(("quasar", name) for name in ("build", "generate", "verify", "sweep", "env")),
        ("export",),
        ("export", "build"),
        ("export", "compile"),
        ("export", "inspect"),
        ("engines",),
        ("engines", "compare"),
        ("engines", "time"),
        ("runtime",),
        ("runtime", "generate"),
        ("runtime", "verify"),
        ("runtime", "bench"),
        ("runtime", "accuracy"),
        ("calibration",),
        ("calibration", "report"),
        ("calibration", "sweep"),
        ("evaluation",),
        *(("evaluation", name) for name in ("verify", "bench", "accuracy", "simulate")),
        *(("evaluation", name) for name in ("report", "sweep", "compare", "time")),
    ],
)
def test_help_answers_at_once(arguments):
    """What makes help slow is what it imports."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['x', *arguments[1:], '--help']!r}\n"
        f"try: runpy.run_module({arguments[0]!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0"
    )
    loaded = loaded_by(code)
    assert not loaded & {*HEAVY, *EVALUATION, "onnxruntime", "tokenizers"}
