"""Directories for native kernels alone: the same tokens from fewer files, and whatever needs the others refuses."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import runtime
from engines import load_engine
from engines.directory import open_directory
from engines.onnxruntime import loading
from engines.onnxruntime.files import onnxruntime_files
from engines.onnxruntime.kernels import Kernels
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from evaluation.roofline import engine_model
from export.build import build
from export.build_options import BuildOptions, CompileOptions
from export.cli import app
from export.compilers import compiler_of
from export.file_purposes import purpose
from export.inspect import print_manifest, print_summary
from export.trim import native_alone, trim_to_native
from plugins.cpu import toolchain
from quasar.errors import BuildError, EngineError
from tests.export.killed_build import start_build
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

pytestmark = needs_library

PROMPTS = ("A kettle", "the the the the")
LEFT_OUT = {"verifier.onnx", "verifier.onnx.data", "onnxruntime/verifier.onnx", "onnxruntime/probe.onnx"}
SHARED = "onnxruntime/native.onnx.shared.data"


@pytest.fixture(scope="module")
def native_engine(tiny_model, build_engine):
    return build_engine(tiny_model, kernels="native")


def whole_copy(engine: Path, folder: Path) -> Path:
    """A whole engine's files, as a build has them before they are trimmed."""
    shutil.copytree(engine, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_has_what_native_kernels_read_and_nothing_twice(tiny_engine, native_engine):
    whole, trimmed = open_directory(tiny_engine).manifest, open_directory(native_engine).manifest
    assert set(trimmed.files) == set(whole.files) - LEFT_OUT | {SHARED}
    packed = "onnxruntime/native.onnx.data"
    assert trimmed.files[packed] == whole.files[packed]
    # Embedding, norms and tables, each on a page of its own: no weight of a linear.
    tensors = ir.load(native_engine / "onnxruntime/native.onnx").graph.initializers.values()
    shared = [value.const_value for value in tensors if isinstance(value.const_value, ir.ExternalTensor)]
    shared = [tensor for tensor in shared if tensor.location == SHARED]
    assert {tensor.name for tensor in shared} >= {"embed_tokens.weight", "norm.weight", "rotary.cos"}
    last = max(tensor.offset + tensor.nbytes for tensor in shared)
    assert trimmed.files[SHARED]["bytes"] == last
    assert last < sum(-(-tensor.nbytes // 4096) for tensor in shared) * 4096 + 1
    files = onnxruntime_files(trimmed)
    assert files.native_alone
    assert (files.graph, files.probe, files.weights, files.native_shared) == ("", "", "", SHARED)
    assert not onnxruntime_files(whole).native_alone


def test_tokens_and_logits_are_those_of_the_whole_directory(tiny_engine, native_engine):
    whole, trimmed = runtime.load(tiny_engine), runtime.load(native_engine)
    for prompt in PROMPTS:
        expected = whole.generate(prompt, max_new_tokens=24, drafter="none").token_ids
        for drafter in ("none", "prompt-lookup"):
            assert trimmed.generate(prompt, max_new_tokens=24, drafter=drafter).token_ids == expected
    tokens = np.random.default_rng(1).integers(0, 320, 40)
    logits = [load_engine(one).session.run_logits(tokens, 0, 40) for one in (tiny_engine, native_engine)]
    np.testing.assert_array_equal(*logits)
    before, after = (open_directory(one).manifest for one in (tiny_engine, native_engine))
    assert after.fidelity == before.fidelity
    assert after.record.row_invariance == before.record.row_invariance


def test_another_machine_is_probed_with_what_is_there(native_engine, monkeypatch):
    another = dataclasses.replace(loading.this_machine(1, Kernels()), processor="Another CPU")
    monkeypatch.setattr(loading, "this_machine", lambda threads, kernels: another)
    found = load_engine(native_engine, options=OnnxRuntimeOptions(threads=1)).record
    assert (found.machine["processor"], found.row_invariance.chain) == ("Another CPU", 1)


def test_a_tied_float_head_and_float_linears_are_kept(tmp_path, build_engine):
    model = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    engine = build_engine(model, kernels="native", keep_float=("lm_head", "*.down_proj"), alpha="off")
    assert load_engine(engine).session.run_logits(np.arange(5), 0, 5).shape == (5, 320)
    tensors = ir.load(engine / "onnxruntime/native.onnx").graph.initializers
    assert tensors["layers.0.mlp.down_proj.weight"].const_value.location == SHARED


def test_inspect_says_what_it_is_for(native_engine, capsys):
    directory = open_directory(native_engine)
    print_manifest(directory)
    shown = " ".join(capsys.readouterr().out.split())
    assert "built for native kernels alone (--kernels native)" in shown
    assert all(purpose(name) for name in directory.manifest.files)
    print_summary(directory)
    assert "MB of weights" in capsys.readouterr().out


def test_stock_kernels_are_refused(native_engine, monkeypatch, tmp_path, capsys):
    message = "kernels is 'stock', and the engine has native ones alone: build it again without --kernels native"
    with pytest.raises(EngineError, match=message):
        load_engine(native_engine, options=OnnxRuntimeOptions(kernels="stock"))
    monkeypatch.setattr(toolchain, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(EngineError, match=r"has native kernels alone, and they cannot run: .* without --kernels"):
        load_engine(native_engine)
    print_manifest(open_directory(native_engine))
    assert "here: none, the engine has native kernels alone" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("backend", ["cuda", "tensorrt-rtx"])
def test_nothing_is_compiled_from_it(backend, native_engine):
    before = contents(native_engine)
    options = CompileOptions(directory=native_engine, backend=backend, compute_capabilities=("8.9",))
    message = f"was built with --kernels native, and {backend} is compiled from the portable graph, which it has not"
    with pytest.raises(BuildError, match=message):
        compiler_of(backend).compile_engine(options)
    assert contents(native_engine) == before
    with pytest.raises(EngineError, match="has no portable graph"):
        engine_model(open_directory(native_engine))


def test_options_that_contradict_each_other(tiny_model, tmp_path):
    output = tmp_path / "engine"
    arguments = ["build", str(tiny_model), "-o", str(output), "--kernels", "native", "--backend", "cuda"]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, BuildError)
    assert "--kernels native leaves out the portable graph, which cuda would be compiled from" in str(error)
    with pytest.raises(BuildError, match="--kernels is 'stock'; 'native' was expected"):
        build(BuildOptions(model=str(tiny_model), output=output, kernels="stock"))
    assert list(tmp_path.iterdir()) == []


def test_models_and_machines_that_native_kernels_do_not_take(tiny_model, tmp_path, monkeypatch):
    output = tmp_path / "engine"
    wide = save_tiny_model(tmp_path / "wide", "llama", head_dim=288)
    with pytest.raises(BuildError, match="native kernels take heads of up to 256 values"):
        build(BuildOptions(model=str(wide), output=output, kernels="native"))
    monkeypatch.setattr(toolchain, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(EngineError, match="native kernels cannot run: there is no library of native operators at"):
        build(BuildOptions(model=str(tiny_model), output=output, kernels="native"))
    assert not output.with_name("engine.partial").exists()


class _Killed(BaseException):
    pass


def test_trimming_may_stop_before_any_change_of_the_disk(tiny_engine, tmp_path, monkeypatch):
    files = onnxruntime_files(open_directory(tiny_engine).manifest)
    expected = whole_copy(tiny_engine, tmp_path / "expected")
    trim_to_native(expected, "verifier.onnx", files)
    kept = {name for name in native_alone(files).names if name}
    assert kept <= set(contents(expected))
    # Three files are renamed into place, four are deleted.
    for stop in range(7):
        folder, changes = whole_copy(tiny_engine, tmp_path / f"stop-{stop}"), []
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                real = getattr(os, name)

                def change(*arguments, real=real, changes=changes, stop=stop, **options):
                    if len(changes) == stop:
                        raise _Killed
                    changes.append(arguments)
                    return real(*arguments, **options)

                patch.setattr(os, name, change)
            with pytest.raises(_Killed):
                trim_to_native(folder, "verifier.onnx", files)
        # As `open_workspace` does.
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink()
        trim_to_native(folder, "verifier.onnx", files)
        assert contents(folder) == contents(expected)


def test_a_build_that_was_killed_there_goes_on(tiny_model, few_prompts, native_engine, tmp_path):
    output = tmp_path / "engine"
    process = start_build(tiny_model, output, few_prompts, "trim", kernels="native")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    options = {"model": str(tiny_model), "output": output, "calibration": few_prompts}
    with pytest.raises(BuildError, match=r"unfinished build with other inputs \(kernels differ\)"):
        build(BuildOptions(**options))
    build(BuildOptions(**options, kernels="native"))
    assert open_directory(output).manifest.files == open_directory(native_engine).manifest.files
