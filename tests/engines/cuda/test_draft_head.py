"""Draft heads on CUDA: what a directory has of them, which are loaded, and their steps on a stand-in for a GPU
(interpreted_draft_head.py has what is asserted there)."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import runtime
from engines.cuda import loading
from engines.cuda.draft_head import CudaDraftHead
from engines.cuda.files import CudaFiles, cuda_files, read_kernel_records, read_program
from engines.cuda.launches import Limits, launches
from engines.cuda.load_options import CudaOptions
from engines.cuda.loading import load_cuda
from engines.cuda.pass_sizes import PassSizes
from engines.cuda.program import TARGETS, Embed, Head, PlaceColumns, Receive, Tell
from engines.directory import open_directory
from engines.gpu import record as gpu_record
from engines.gpu.device import Gpu
from engines.gpu.driver import GpuSearch
from engines.gpu.host_device import HostDevice
from export.add_head import add_head
from export.build_options import CompileOptions, Silent
from export.cli import app
from export.compile_cuda import compile_engine
from quasar.errors import DamagedEngineError, EngineError
from tests.draft_heads import copy_engine, write_random_head
from tests.engines.cuda.fakes import compile_quickly
from tests.engines.cuda.test_launches import addresses
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

pytestmark = needs_library

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
HEADS = {
    "eagle3": {},
    "eagle": {"kind": "eagle", "fuse_bias": True},
    "norms of features": {"feature_norm": "each", "norm_output": True},
    "norm of all features": {"feature_norm": "all", "norm_before_residual": True},
    "every token": {"feature_layers": (2,), "draft_vocab_size": 0},
    "w8a8": {"precision": "w8a8"},
    "w8a8-block": {"precision": "w8a8-block", "attention": {"qk_norm": "head"}},
    "w4a16": {"precision": "w4a16", "own_embedding": True},
}
ADA = Gpu(name="NVIDIA Ada", compute_capability="8.9", driver="13.1")


def with_head(folder, model, engine, precision="w4a8", **options):
    write_random_head(folder / "head", model, **options)
    add_head(copy_engine(engine, folder / "engine"), folder / "head", precision=precision)
    return folder / "engine"


def check_head(names, only, passed, *, shared_engine, make_once):
    model = make_once("cuda-head-model", lambda folder: save_tiny_model(folder / "model", "llama", **SMALL)) / "model"
    engine = shared_engine(model)
    engines = []
    for name in names:
        folder = make_once(
            f"cuda-head-{name}", lambda folder, name=name: with_head(folder, model, engine, **HEADS[name])
        )
        engines.append(str(folder / "engine"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-k", only, str(Path(__file__).with_name("interpreted_draft_head.py"))),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "QUASAR_TEST_ENGINES": os.pathsep.join(engines)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert passed in done.stdout.splitlines()[-1]


def test_a_head_on_the_stand_in(shared_engine, make_once):
    check_head(["eagle3"], "", "3 passed", shared_engine=shared_engine, make_once=make_once)


@pytest.mark.full
def test_every_kind_of_head_on_the_stand_in(shared_engine, make_once):
    names = [name for name in HEADS if name != "eagle3"]
    check_head(names, "tells or steps", "14 passed", shared_engine=shared_engine, make_once=make_once)


@pytest.fixture
def quickly(monkeypatch):
    compile_quickly(monkeypatch)


@pytest.fixture
def engine(head_engine, tmp_path):
    return shutil.copytree(head_engine, tmp_path / "engine")


@pytest.fixture
def on_host_memory(monkeypatch):
    """An Ada whose memory is the host's, with kernels that do nothing; the devices that were opened."""
    devices = []

    def device():
        devices.append(HostDevice(1 << 40, lambda kernel, grid, arguments: None))
        return devices[-1]

    monkeypatch.setattr(loading, "find_gpu", lambda: GpuSearch(found=ADA, reason=""))
    monkeypatch.setattr(loading, "CudaDevice", device)
    monkeypatch.setattr(
        gpu_record,
        "run_probes",
        lambda session, machine, plan: replace(record_of(), machine=machine.to_json()),
    )

    def record_of():
        return open_directory(devices[-1].engine).manifest.record

    return devices


def compiled(directory):
    return compile_engine(CompileOptions(directory=directory, backend="cuda", compute_capabilities=("8.9",)))


def test_programs_of_an_engine_with_a_head(engine, quickly):
    directory = compiled(engine)
    manifest, files = directory.manifest, cuda_files(directory.manifest)
    assert files.draft_head.graph == manifest.draft_head.graph
    assert CudaFiles.from_json(files.to_json()) == files
    assert {path.relative_to(engine).as_posix() for path in (engine / "cuda").iterdir()} == set(files.names)
    plain, verifier, head = (
        read_program(directory.file(name))
        for name in (files.program, files.draft_head.verifier, files.draft_head.program)
    )
    # The verifier computes what it did, and goes on.
    assert verifier.steps[: len(plain.steps)] == plain.steps
    assert plain.tensors.items() <= verifier.tensors.items()
    *_, told = verifier.steps[len(plain.steps) :]
    assert told == Tell(input="fc.output", columns=manifest.draft_head.hidden_size, selected=False)
    # The head reads the verifier's embedding, where it lies.
    (embedding,) = [step for step in head.steps if isinstance(step, Embed)]
    assert head.tensors[embedding.table] == plain.tensors[embedding.table]
    ends = [one.offset + one.bytes for one in (*verifier.tensors.values(), *head.tensors.values())]
    assert max(ends) == (engine / files.weights).stat().st_size
    assert head.tensors[TARGETS].bytes == 8 * manifest.draft_head.draft_vocab_size
    kinds = [type(step) for step in head.steps]
    assert kinds[0] is Receive
    assert kinds[-1] is Tell
    assert [step.first for step in head.steps if isinstance(step, PlaceColumns)] == [0, embedding.columns]
    names = [record.name for record in read_kernel_records(directory.file(files.kernels[0].file))]
    assert names == list(dict.fromkeys(one.name for one in (*verifier.variants(), *head.variants())))
    assert "likelihoods_8" in names


def test_launches_of_a_step(engine, quickly):
    """Rows alone are selected, normed and told of; log-probabilities follow the likeliest tokens of the same rows."""
    directory = compiled(engine)
    files = cuda_files(directory.manifest).draft_head
    program = read_program(directory.file(files.program))
    limits = Limits(capacity=512, most_splits=1, multiprocessors=8, tokens=64, head_rows=32)
    sizes = PassSizes(tokens=5, rows=2, splits=0, tiles=(1,), logits=False)
    made = list(launches(program, sizes, addresses(1), limits))
    assert [one.grid for one in made if one.kernel.startswith("place_")] == [(5,), (5,)]
    assert made[-1].kernel == "likelihoods_8"
    assert made[-1].grid == (2,)
    # The logits are written for it, and not copied.
    head = next(step for step in program.steps if isinstance(step, Head))
    (written,) = [one for one in made if one.kernel.startswith("lm_head_")]
    assert written.arguments[-2] == 1
    assert written.logits is None
    assert made[-1].arguments[0] == written.arguments[5]
    assert made[-1].arguments[-1] == head.vocabulary
    none = list(launches(program, replace(sizes, rows=0), addresses(1), limits))
    assert not [one for one in none if one.kernel.startswith(("likelihoods", "lm_head", "gather_rows_float32"))]


def test_which_head_is_loaded(engine, tiny_model, tmp_path, quickly, on_host_memory, monkeypatch, caplog):
    monkeypatch.setattr(HostDevice, "engine", engine, raising=False)
    compiled(engine)
    sessions, _ = load_cuda(open_directory(engine), CudaOptions(slots=2))
    assert isinstance(sessions.head, CudaDraftHead)
    assert (sessions.head.num_slots, sessions.head.contract.num_layers) == (2, 1)
    assert sessions.verifier.hidden_states is not None
    sessions.verifier.close()
    sessions.head.close()
    # One device holds both.
    assert [device.closed for device in on_host_memory] == [True]
    plain, _ = load_cuda(open_directory(engine), CudaOptions(draft_head=False))
    assert plain.head is None
    assert plain.verifier.hidden_states is None
    plain.verifier.close()
    with runtime.load(engine, backend="cuda") as loaded:
        assert loaded._open().draft_head is not None
        assert loaded.memory().drafters > 0

    # Another head since: the one that was compiled is not the engine's.
    write_random_head(tmp_path / "other", tiny_model, norm_output=True)
    added = CliRunner().invoke(app, ["add-head", str(engine), str(tmp_path / "other")])
    assert "cuda goes without it until python -m export compile" in " ".join(added.output.split())
    with caplog.at_level(logging.WARNING, "quasar.engines"):
        sessions, _ = load_cuda(open_directory(engine), CudaOptions())
    assert sessions.head is None
    sessions.verifier.close()
    assert "was not compiled for cuda, which goes without it" in caplog.text
    assert f"compile {engine} --backend cuda" in caplog.text
    before = set(cuda_files(open_directory(engine).manifest).names)
    compiled(engine)
    sessions, _ = load_cuda(open_directory(engine), CudaOptions())
    assert sessions.head is not None
    sessions.verifier.close()
    now = set(cuda_files(open_directory(engine).manifest).names)
    assert {path.relative_to(engine).as_posix() for path in (engine / "cuda").iterdir()} == now != before


def test_a_head_without_a_form_is_left_out(engine, tiny_model, tmp_path, quickly):
    """Floats, and linears of few inputs, which stay floats; the engine is compiled as without a head."""
    before = cuda_files(compiled(engine).manifest)
    for precision, said in (("fp32", "cuda has no form of float"), ("w4a8-128", r"\(MatMul\) has no CUDA form")):
        write_random_head(tmp_path / "head", tiny_model)
        add_head(engine, tmp_path / "head", precision=precision)
        reporter = Said()
        options = CompileOptions(directory=engine, backend="cuda", compute_capabilities=("8.9",))
        files = cuda_files(compile_engine(options, reporter).manifest)
        assert files.draft_head is None
        assert files.program == before.program
        (detail,) = [detail for stage, detail in reporter.stages if stage == "draft head"]
        assert re.search(rf"left out, and cuda goes without it: .*{said}; add-head --precision w4a8", detail)
        # No byte of the head is left among the weights.
        program = read_program(engine / files.program)
        ends = [one.offset + one.bytes for one in program.tensors.values()]
        assert max(ends) == (engine / files.weights).stat().st_size


class Said(Silent):
    """Keeps the stages."""

    def __init__(self):
        self.stages = []

    def stage(self, name, detail):
        self.stages.append((name, detail))


def test_no_room_for_the_head(engine, quickly, on_host_memory, monkeypatch):
    monkeypatch.setattr(HostDevice, "engine", engine, raising=False)
    directory = compiled(engine)
    plain, _ = load_cuda(directory, CudaOptions(draft_head=False))
    taken = plain.verifier.memory()
    plain.verifier.close()
    room = taken.weights + taken.cache + taken.buffers + 100_000
    monkeypatch.setattr(loading, "CudaDevice", lambda: HostDevice(room, lambda kernel, grid, arguments: None))
    said = r"no room for the draft head: its cache takes \d+ bytes.*without it, options=CudaOptions\(draft_head=False\)"
    with pytest.raises(EngineError, match=said):
        load_cuda(directory, CudaOptions())


def test_a_damaged_part_is_named(engine, quickly):
    compiled(engine)
    path = engine / "manifest.json"
    manifest = json.loads(path.read_text())
    for value, said in (("x", "draft_head"), ({"graph": "g"}, "backends.cuda.draft_head lacks the field 'verifier'")):
        manifest["backends"]["cuda"]["draft_head"] = value
        path.write_text(json.dumps(manifest))
        with pytest.raises(DamagedEngineError, match=said):
            open_directory(engine)
