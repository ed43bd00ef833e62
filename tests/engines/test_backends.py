"""What the registry promises of every back end, and what a back end that this installation lacks leaves alone."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import engines
from engines import backends
from engines.directory import open_directory
from engines.loading import load_engine
from engines.manifest import Manifest
from export.inspect_backend import backend_json
from quasar.errors import BuildError, EngineError

FOLDER = Path(engines.__file__).parent


def test_each_is_registered_under_its_own_name():
    assert {name: backend.name for name, backend in backends.all_backends().items()} == {
        name: name for name in backends.BACKENDS
    }


def test_each_runs_on_a_device_and_says_what_it_needs():
    for backend in backends.all_backends().values():
        assert backend.device in (backends.CPU, backends.GPU)
        assert backend.packages
        assert backend.options()


def test_asking_for_one_imports_none_of_what_it_needs():
    code = "from engines.backends import all_backends; import sys; all_backends(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needed = {package for backend in backends.all_backends().values() for package in backend.packages}
    assert not needed & {*done.stdout.split()}


@pytest.mark.parametrize(
    "path", [path for path in FOLDER.rglob("*.py") if path.parent in (FOLDER, FOLDER / "probes")], ids=str
)
def test_what_all_share_imports_no_back_end(path):
    """But for the package, which offers the types of their options."""
    if path.name in ("__init__.py",):
        return
    folders = {f"engines.{folder.name}" for folder in FOLDER.iterdir() if (folder / "backend.py").is_file()}
    assert folders == {"engines.onnxruntime", "engines.cuda", "engines.tensorrt"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not any(f"{node.module}.".startswith(f"{folder}.") for folder in folders), f"{path}: {node.module}"


@pytest.fixture
def with_unknown_part(tiny_engine, tmp_path):
    """An engine to which a later version added a back end."""
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    (engine / "abacus").mkdir()
    (engine / "abacus" / "beads.bin").write_bytes(b"12345")
    value = json.loads((engine / "manifest.json").read_text())
    value["backends"]["abacus"] = {"beads": "abacus/beads.bin", "rows": [1, 2, {"deep": None}]}
    value["files"]["abacus/beads.bin"] = {
        "bytes": 5,
        "sha256": "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5",
    }
    (engine / "manifest.json").write_text(json.dumps(value))
    return engine, value


def test_an_unknown_part_is_kept_and_names_no_other_engine(with_unknown_part, tiny_engine):
    engine, value = with_unknown_part
    directory = open_directory(engine)
    assert directory.manifest.to_json() == value
    assert directory.manifest.engine_hash == open_directory(tiny_engine).manifest.engine_hash
    assert load_engine(engine).backend == "onnxruntime"
    with pytest.raises(
        EngineError, match="unknown backend 'abacus'; known are onnxruntime, cuda, tensorrt, tensorrt-rtx"
    ):
        load_engine(engine, backend="abacus")
    with pytest.raises(EngineError, match="unknown backend 'abacus'"):
        backend_json(directory, "abacus")


def test_an_engine_without_what_every_build_has_is_damaged(with_unknown_part):
    _, value = with_unknown_part
    del value["backends"]["onnxruntime"]
    with pytest.raises(EngineError, match="backends lacks the field 'onnxruntime'"):
        Manifest.from_json(value)


def test_options_belong_to_a_back_end(tiny_engine):
    with pytest.raises(EngineError, match="'onnxruntime' takes OnnxRuntimeOptions; TensorRtOptions came as options"):
        load_engine(tiny_engine, backend="onnxruntime", options=engines.TensorRtOptions())
    with pytest.raises(EngineError, match="has no back end that takes TensorRtOptions"):
        load_engine(tiny_engine, options=engines.TensorRtOptions())
    stock = load_engine(tiny_engine, options=engines.OnnxRuntimeOptions(kernels="stock"))
    assert (stock.kernels, stock.kernels_reason) == ("stock", "")


def test_what_every_build_makes_cannot_be_compiled():
    from export.compilers import compiler_of

    with pytest.raises(BuildError, match="onnxruntime has nothing to compile: every build makes it"):
        compiler_of("onnxruntime")
