"""Who may import whom, and that nothing heavy is imported before it is needed."""

import ast
import json
import struct
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
    "serving": {"quasar", "engines", "runtime"},
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
SERVING = ("starlette", "uvicorn", "prometheus_client", "h11", "anyio", "ray")


# Our modules by name.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PRESENT
    for path in (ROOT / package).rglob("*.py")
}
# What the module docstring of command lines says once for all of their late imports.
LATE = "imported when it runs"


def imports_of(path):
    """(module name, the import's node, whether it stands inside a function) of every import in a file."""
    yield from _imports_below(ast.parse(path.read_text(encoding="utf-8")), path, inside=False)


def _imports_below(node, path, inside):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}: relative import"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield name if name in MODULES else child.module, child, inside
        else:
            yield from _imports_below(child, path, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("package", PRESENT)
def test_packages_import_in_one_direction(package):
    for path in (ROOT / package).rglob("*.py"):
        for name, _, _ in imports_of(path):
            top = name.split(".")[0]
            if top in ALLOWED and top != package:
                allowed = ALLOWED[package] | UPWARD.get(path.relative_to(ROOT).as_posix(), set())
                assert top in allowed, f"{path} imports {name}"
            if package == "runtime":
                assert top not in HEAVY, f"{path} imports {name}"


def circles(modules):
    """Pairs of modules (name → path) that import each other, for types alone too."""
    imported = {name: {found for found, _, _ in imports_of(path)} for name, path in modules.items()}
    return [
        (one, other)
        for one, names in imported.items()
        for other in names
        if one < other and one in imported.get(other, ())
    ]


def test_no_two_modules_import_each_other():
    assert not circles(MODULES)


def test_a_circle_is_seen(tmp_path):
    (tmp_path / "one.py").write_text("def late():\n    import two\n")
    (tmp_path / "two.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from one import late\n")
    assert circles({name: tmp_path / f"{name}.py" for name in ("one", "two")}) == [("one", "two")]


def unexplained(path):
    """Our modules that a function of the file imports without a comment at the import or above its block."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    explained = set()
    for name, node, inside in imports_of(path):
        if not inside or name.split(".")[0] not in ALLOWED or LATE in (ast.get_docstring(ast.parse(source)) or ""):
            continue
        before, here = lines[node.lineno - 2], lines[node.lineno - 1]
        # One reason is enough for a block of imports.
        if "#" in here or "#" in before or node.lineno - 1 in explained:
            explained.update(range(node.lineno, node.end_lineno + 1))
        else:
            yield f"{path.name}:{node.lineno} {name}"


def test_late_imports_have_a_reason_beside_them():
    assert not [found for path in MODULES.values() for found in unexplained(path)]


def test_a_late_import_without_a_reason_is_seen(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("def late():\n    import runtime\n\ndef reasoned():\n    import engines  # it is heavy\n")
    assert [*unexplained(path)] == ["one.py:2 runtime"]


def loaded_by(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import runtime", "import quasar; quasar.load"])
def test_import_runtime_is_light(code):
    loaded = loaded_by(code)
    assert not loaded & {*HEAVY, *EVALUATION, "onnxruntime", "tokenizers", "jinja2", "typer", "rich"}


@pytest.mark.parametrize("name", ["application", "affinity", "relay", "replica", "process"])
def test_ray_is_imported_when_an_application_is_built(name):
    assert "ray" not in loaded_by(f"import serving.ray.{name}")


def test_generating_needs_no_build_libraries(tiny_engine):
    code = f"import runtime; runtime.load({str(tiny_engine)!r}).generate('hi', max_new_tokens=4)"
    loaded = loaded_by(code)
    assert "onnxruntime" in loaded
    assert not loaded & {*HEAVY, *EVALUATION, "typer", "rich"} - {"huggingface_hub"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("quasar",),
        *(("quasar", name) for name in ("build", "generate", "serve", "verify", "sweep", "env")),
        ("export",),
        ("export", "build"),
        ("export", "compile"),
        ("export", "inspect"),
        ("export", "list"),
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
        ("calibration", "train-head"),
        ("evaluation",),
        *(("evaluation", name) for name in ("verify", "bench", "accuracy", "simulate")),
        ("serving",),
        ("serving", "serve"),
        *(("evaluation", name) for name in ("report", "sweep", "compare", "time", "roofline")),
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
    assert not loaded & {*HEAVY, *EVALUATION, *SERVING, "onnxruntime", "tokenizers"}


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 512,
}


def gguf_head(architecture):
    """The first field of a GGUF file, which says that three more follow; nothing does."""
    key, value = b"general.architecture", architecture.encode()
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    return b"GGUF" + struct.pack("<IQQ", 3, 5, 4) + field


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"architectures": ["MambaForCausalLM"]}', "unsupported architecture: MambaForCausalLM"),
        ("config.json", json.dumps({**LLAMA, "hidden_act": "gelu"}).encode(), "unsupported hidden_act"),
        ("config.json", json.dumps(LLAMA).encode(), "has no safetensors weights"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1", "not a GGUF file"),
        ("model.gguf", gguf_head("mamba"), "unsupported architecture: GGUF 'mamba'"),
        ("README.md", b"", "config.json is missing"),
        ("engine/notes.txt", b"", "exists and is no engine directory"),
    ],
)
def test_a_build_refuses_without_the_libraries_that_make_one(tmp_path, name, content, message):
    """What makes a refusal slow is what it imports: the command itself, so that its own imports count."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    model = tmp_path / name if name == "model.gguf" else tmp_path
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', 'build', {str(model)!r}, '-o', {str(tmp_path / 'engine')!r}]\n"
        "sys.stderr = sys.stdout\n"
        "try: runpy.run_module('export', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    *said, loaded = done.stdout.splitlines()
    assert message in " ".join(said)
    assert not set(loaded.split()) & {*HEAVY, "onnxruntime", "tokenizers", "jinja2", "sympy"}
