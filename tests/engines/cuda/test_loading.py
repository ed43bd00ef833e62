"""Which kernels are taken, and what is said where none can be: the GPU is a stand-in whose kernels do nothing."""

import json
import re
import shutil
import sys
import zipfile
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest

import runtime
from engines.contract import capacity_for, longest_for
from engines.cuda import backend, loading
from engines.cuda.files import cuda_files, read_kernel_records, read_program
from engines.cuda.graphs import MOST_GRAPHS
from engines.cuda.load_options import CudaOptions
from engines.cuda.loading import probe_plan
from engines.cuda.session import CudaSession
from engines.directory import open_directory
from engines.gpu import record as gpu_record
from engines.gpu.device import Gpu, LoadedKernel
from engines.gpu.driver import GpuSearch
from engines.gpu.host_device import HostDevice
from engines.gpu.limits import slots_that_fit
from engines.loading import choose_backend, load_engine
from engines.session import Positions
from engines.tensorrt.backend import TensorRtBackend
from export.build_options import CompileOptions
from export.compile_cuda import compile_engine
from plugins.gpu.variants import KERNELS_VERSION
from quasar.errors import DamagedEngineError, EngineError
from quasar.files import sha256_file
from tests.engines.cuda.fakes import compile_quickly

TURING = Gpu(name="NVIDIA Turing", compute_capability="7.5", driver="13.1")
ADA = Gpu(name="NVIDIA Ada", compute_capability="8.9", driver="13.1")
HOPPER = Gpu(name="NVIDIA Hopper", compute_capability="9.0", driver="13.1")


@pytest.fixture(scope="module")
def compiled_engine(tiny_engine, tmp_path_factory):
    """Compiled for Ada. Read it, and never write there."""
    engine = shutil.copytree(tiny_engine, tmp_path_factory.mktemp("loading") / "engine")
    with pytest.MonkeyPatch.context() as patched:
        compile_quickly(patched)
        compile_engine(CompileOptions(directory=engine, backend="cuda", compute_capabilities=("8.9",)))
    return engine


@pytest.fixture
def engine(compiled_engine, tmp_path):
    return shutil.copytree(compiled_engine, tmp_path / "engine")


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine with a GPU, as far as looking goes."""

    def put(gpu):
        monkeypatch.setattr(loading, "find_gpu", lambda: GpuSearch(found=gpu, reason=""))

    return put


@pytest.fixture
def on_host_memory(with_gpu, monkeypatch):
    """An Ada whose memory is the host's: every pass gives token 0. `devices` were opened, each with `memory_bytes`."""
    with_gpu(ADA)
    machine = SimpleNamespace(devices=[], memory_bytes=1 << 40)

    def device():
        machine.devices.append(HostDevice(machine.memory_bytes, lambda kernel, grid, arguments: None))
        return machine.devices[-1]

    monkeypatch.setattr(loading, "CudaDevice", device)
    return machine


@pytest.fixture
def probed(tiny_engine, monkeypatch):
    """The machines that were measured; what is found is the CPU's record."""
    machines = []
    record = open_directory(tiny_engine).manifest.record

    def run_probes(session, machine, plan):
        assert isinstance(session, CudaSession)
        machines.append(machine)
        return replace(record, machine=machine.to_json())

    monkeypatch.setattr(gpu_record, "run_probes", run_probes)
    return machines


def one_line(engine, backend="cuda"):
    with pytest.raises(EngineError) as caught:
        runtime.load(engine, backend=backend)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(engine, name, data):
    """Another content for a file, with the manifest's consent."""
    (engine / name).write_bytes(data)
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256_file(engine / name)}
    (engine / "manifest.json").write_text(json.dumps(manifest))


def files_of(engine):
    return cuda_files(open_directory(engine).manifest)


def test_without_a_gpu(compiled_engine):
    assert one_line(compiled_engine) == (
        "backend 'cuda' needs an NVIDIA GPU: there is no NVIDIA driver on this machine; backend='onnxruntime' runs on "
        "the CPU"
    )


def test_without_cuda_python(compiled_engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert one_line(compiled_engine) == (
        "backend 'cuda' needs an NVIDIA GPU: cuda-python is not installed: run pip install 'quasar-verifier[cuda]'; "
        "backend='onnxruntime' runs on the CPU"
    )


def test_a_gpu_that_is_too_old(compiled_engine, with_gpu):
    with_gpu(TURING)
    assert one_line(compiled_engine) == (
        "NVIDIA Turing has compute capability 7.5; backend 'cuda' needs 8.0 or above, for its INT8 tensor cores: "
        "backend='onnxruntime' runs on the CPU"
    )


def test_a_directory_without_that_back_end(tiny_engine, with_gpu):
    with_gpu(ADA)
    assert one_line(tiny_engine) == (
        f"{tiny_engine} has no cuda back end: run python -m export compile {tiny_engine} --backend cuda"
    )


def test_kernels_for_another_gpu(compiled_engine, with_gpu):
    with_gpu(HOPPER)
    assert one_line(compiled_engine) == (
        f"{compiled_engine} has no kernels for this GPU (NVIDIA Hopper, compute capability 9.0; kernels: 8.9): run "
        f"python -m export compile {compiled_engine} --backend cuda --compute-capability 9.0"
    )


def test_an_old_driver(compiled_engine, with_gpu):
    needed = int(files_of(compiled_engine).kernels[0].cuda.split(".")[0])
    with_gpu(replace(ADA, driver=f"{needed - 1}.9"))
    assert one_line(compiled_engine) == (
        f"the NVIDIA driver is for CUDA {needed - 1}.9, and the kernels for compute capability 8.9 need one for CUDA "
        f"{needed} or above: update the driver"
    )


def test_a_kernel_that_the_file_lacks(engine, on_host_memory):
    name = files_of(engine).kernels[0].file
    with zipfile.ZipFile(engine / name) as archive:
        records = json.loads(archive.read("kernels.json"))["kernels"]
        images = {one["name"]: archive.read(f"{one['name']}.cubin") for one in records}

    def write(records, images):
        with zipfile.ZipFile(engine / name, "w") as archive:
            archive.writestr("kernels.json", json.dumps({"version": KERNELS_VERSION, "kernels": records}))
            for kernel, image in images.items():
                archive.writestr(f"{kernel}.cubin", image)
        rewrite(engine, name, (engine / name).read_bytes())

    write([one for one in records if one["name"] not in ("kv_compact", "gather_rows_float32")], images)
    assert one_line(engine) == "kernels are missing: gather_rows_float32, kv_compact: compile the engine again"
    assert on_host_memory.devices[-1].closed
    write(records, {kernel: image for kernel, image in images.items() if kernel != "kv_compact"})
    assert one_line(engine) == f"{engine / name} lacks the kernel kv_compact: compile the engine again"
    assert on_host_memory.devices[-1].closed


@pytest.mark.parametrize("version", [1, KERNELS_VERSION + 1])
def test_kernels_of_another_version(engine, with_gpu, version):
    """Version 1 is a plain list. They take other arguments than they would get; the CPU still runs the engine."""
    with_gpu(ADA)
    name = files_of(engine).kernels[0].file
    records = [asdict(one) for one in read_kernel_records(engine / name)]
    with zipfile.ZipFile(engine / name, "w") as archive:
        index = records if version == 1 else {"version": version, "kernels": records}
        archive.writestr("kernels.json", json.dumps(index))
    rewrite(engine, name, (engine / name).read_bytes())
    assert one_line(engine) == (
        f"{engine} has kernels of another version for this GPU (compute capability 8.9), which this version cannot "
        f"launch: run python -m export compile {engine} --backend cuda --compute-capability 8.9"
    )
    with runtime.load(engine) as loaded:
        assert loaded.backend == "onnxruntime"
    # What there is can be looked at.
    assert [one.name for one in read_kernel_records(engine / name)] == [one["name"] for one in records]


@pytest.mark.parametrize("index", ["{", '{"kernels": []}', '{"version": 2}', '{"version": "2", "kernels": []}', "7"])
def test_kernels_that_are_none(engine, on_host_memory, index):
    name = files_of(engine).kernels[0].file
    with zipfile.ZipFile(engine / name, "w") as archive:
        archive.writestr("kernels.json", index)
    rewrite(engine, name, (engine / name).read_bytes())
    assert one_line(engine).startswith(f"{engine / name} holds no kernels (")


def test_damaged_files(engine, on_host_memory):
    files = files_of(engine)
    program, kernels = (engine / files.program).read_bytes(), files.kernels[0].file
    (engine / files.program).write_bytes(program.replace(b"float16", b"bflat16"))
    assert one_line(engine) == (
        f"{engine / files.program} is not the file that was built (its SHA-256 differs): build the engine again"
    )
    rewrite(engine, files.program, b"{")
    assert one_line(engine).startswith(f"{engine / files.program} is no JSON (")
    assert on_host_memory.devices[-1].closed
    rewrite(engine, files.program, program.replace(b'"reach": 32', b'"reach": 31'))
    assert one_line(engine) == (
        f"{engine / files.program} is of an engine with 3 layers, passes of up to 31 tokens and 8 likeliest tokens; "
        "this one has 3, 32 and 8: compile the engine again"
    )
    assert on_host_memory.devices[-1].closed
    rewrite(engine, files.program, program)
    rewrite(engine, kernels, b"no zip")
    assert one_line(engine) == (
        f"{engine / kernels} holds no kernels (File is not a zip file): compile the engine again"
    )


def test_a_manifest_of_another_form(engine):
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["backends"]["cuda"]["cache_type"] = "float8"
    (engine / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedEngineError, match=r"manifest\.json: backends\.cuda\.cache_type is 'float8'"):
        open_directory(engine)


def test_too_little_memory_says_what_fits(compiled_engine, on_host_memory):
    """And the context that it names really fits, but no longer one."""
    directory = open_directory(compiled_engine)
    contract, files = directory.manifest.contract, cuda_files(directory.manifest)
    program, weights = read_program(compiled_engine / files.program), compiled_engine / files.weights
    kernel = LoadedKernel(handle="none", threads=1, shared_bytes=0, types=())
    kernels = dict.fromkeys((variant.name for variant in program.variants()), kernel)

    def session_of(memory_bytes, max_length=contract.max_length, slots=1):
        sizes = replace(contract, max_length=max_length, capacity=capacity_for(max_length))
        device = HostDevice(memory_bytes)
        return CudaSession(program, weights, kernels, device, sizes, slots=slots), device

    session, device = session_of(1 << 40)
    taken, memory = (1 << 40) - device.free_bytes, session.memory()
    # Whatever was allocated is counted.
    assert memory.weights + memory.cache + memory.buffers == taken
    for part in (0.4, 0.7):
        room = int(taken - part * memory.cache)
        on_host_memory.memory_bytes = room
        message = one_line(compiled_engine)
        assert on_host_memory.devices[-1].closed
        found = re.fullmatch(
            rf"the GPU has no room: the weights take {memory.weights} bytes, the KV cache {memory.cache} for "
            rf"{contract.max_length} tokens, and {room} bytes were free: build with --max-length (\d+), or free memory "
            "on the GPU",
            message,
        )
        assert found, message
        length = int(found[1])
        session_of(room, length)
        # What a shorter cache needs less of its buffers is left over: less than a block of positions.
        with pytest.raises(EngineError, match="the GPU has no room"):
            session_of(room, length + 128)
    # With more slots, fewer of them are another way.
    session, device = session_of(1 << 40, slots=6)
    shared, taken = session.memory(), (1 << 40) - device.free_bytes
    assert shared.cache == 6 * memory.cache
    assert shared.weights + shared.cache + shared.buffers == taken
    room = taken - 2 * memory.cache - 1
    with pytest.raises(EngineError) as caught:
        session_of(room, slots=6)
    found = re.fullmatch(
        rf"the GPU has no room: the weights take {shared.weights} bytes, the KV cache {shared.cache} for "
        rf"{contract.max_length} tokens of each of 6 sequences, and {room} bytes were free: load with max_sequences=3, "
        r"build with --max-length (\d+), or free memory on the GPU",
        str(caught.value),
    )
    assert found, str(caught.value)
    session_of(room, slots=3)
    session_of(room, int(found[1]), slots=6)
    on_host_memory.memory_bytes = memory.weights
    assert one_line(compiled_engine).endswith(
        f"and {memory.weights} bytes were free: no --max-length fits beside it, or free memory on the GPU"
    )


@pytest.mark.parametrize("positions", [160, 191, 192, 4096, 4100])
def test_the_longest_context_of_a_cache(positions):
    length = longest_for(positions)
    assert capacity_for(length) <= positions < capacity_for(length + 1)


def test_loading_measures_once_and_generates(compiled_engine, on_host_memory, probed):
    with runtime.load(compiled_engine, backend="cuda") as loaded:
        assert loaded.backend == "cuda"
        assert loaded.record.machine["processor"] == "NVIDIA Ada"
        assert loaded.generate([65, 66], max_new_tokens=3, drafter="none", ignore_eos=True).token_ids == (0, 0, 0)
        record = loaded.record
    assert on_host_memory.devices[-1].closed
    (machine,) = probed
    assert (machine.system, machine.instruction_sets) == ("CUDA 13.1", ("sm89",))
    with runtime.load(compiled_engine, backend="cuda") as again:
        assert again.record == record
    assert len(probed) == 1


def test_other_kernels_or_another_driver_are_measured_again(engine, on_host_memory, probed, with_gpu):
    runtime.load(engine, backend="cuda").close()
    with_gpu(replace(ADA, driver="13.2"))
    runtime.load(engine, backend="cuda").close()
    assert len(probed) == 2
    name = files_of(engine).kernels[0].file
    with zipfile.ZipFile(engine / name, "a") as archive:
        archive.writestr("more", b"other kernels")
    rewrite(engine, name, (engine / name).read_bytes())
    runtime.load(engine, backend="cuda").close()
    assert len(probed) == 3


def test_a_failing_load_frees_the_device(compiled_engine, on_host_memory, monkeypatch):
    def fail(session, machine, plan):
        raise EngineError("no room")

    monkeypatch.setattr(gpu_record, "run_probes", fail)
    assert one_line(compiled_engine) == "no room"
    assert on_host_memory.devices[-1].closed


def test_a_cache_is_probed_where_attention_changes_its_path(compiled_engine):
    contract = replace(open_directory(compiled_engine).manifest.contract, max_length=2048)
    around = probe_plan(contract).boundaries
    assert [length for length in around if length in range(250, 260)] == [254, 255, 256]
    assert {62, 63, 64, 126, 127, 128, 318, 319, 320, 510, 511, 512} <= set(around)
    assert max(probe_plan(replace(contract, max_length=130)).boundaries) < 128


def test_without_a_choice_cuda_runs_where_it_can(compiled_engine, with_gpu, monkeypatch):
    # This machine has no GPU.
    assert runtime.load(compiled_engine).backend == "onnxruntime"
    with_gpu(HOPPER)
    assert runtime.load(compiled_engine).backend == "onnxruntime"
    with_gpu(ADA)
    monkeypatch.setattr(
        backend, "load_cuda", lambda directory, options: (SimpleNamespace(verifier=None, head=None), None)
    )
    assert load_engine(compiled_engine).backend == "cuda"
    assert load_engine(compiled_engine, backend="cuda").backend == "cuda"
    assert load_engine(compiled_engine, backend="onnxruntime").backend == "onnxruntime"


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"onnxruntime", "cuda", "tensorrt", "tensorrt-rtx"}, "cuda"),
        ({"onnxruntime", "tensorrt", "tensorrt-rtx"}, "tensorrt"),
        ({"onnxruntime", "tensorrt-rtx"}, "tensorrt-rtx"),
        ({"onnxruntime"}, "onnxruntime"),
    ],
)
def test_the_order_of_preference(compiled_engine, monkeypatch, able, expected):
    directory = open_directory(compiled_engine)
    sections = directory.manifest.backends
    everything = dict.fromkeys(("tensorrt-rtx", "tensorrt", "cuda"), sections["cuda"])
    manifest = replace(directory.manifest, backends={**everything, "onnxruntime": sections["onnxruntime"]})
    for kind in (backend.CudaBackend, TensorRtBackend):
        monkeypatch.setattr(kind, "refusal", lambda self, directory: "" if self.name in able else "no")
    assert choose_backend(replace(directory, manifest=manifest)).name == expected


def test_passes_are_recorded_once_each(compiled_engine, on_host_memory, probed):
    """The first of a kind runs, the second is recorded and launched, later ones launch the record."""
    launched = []
    with runtime.load(compiled_engine, backend="cuda", max_sequences=1) as loaded:
        session, device = loaded._loaded.session, on_host_memory.devices[-1]
        device._run_kernel = lambda kernel, grid, arguments: launched.append(kernel)
        counts, recorded = [], []
        for _ in range(4):
            session.run([1, 2], 5, 2)
            counts.append(len(launched))
            recorded.append(len(session._graphs))
        assert recorded == [0, 1, 1, 1]
        # Every pass launches as many kernels as the first.
        assert counts == [counts[0] * times for times in (1, 2, 3, 4)]
        session.run(np.arange(40), 0, 1)
        session.run(np.arange(40), 0, 1)
        # Prompts are not recorded.
        assert len(session._graphs) == 1


def test_a_gpus_memory_says_how_many_slots_there_are(compiled_engine, on_host_memory, probed):
    """Half of what is free beside the weights, 16 at most; a caller's number is taken as it is."""
    with runtime.load(compiled_engine, backend="cuda") as loaded:
        session = loaded._loaded.session
        assert (session.num_slots, session.max_sequences, session.max_positions) == (16, 16, 256)
        memory = session.memory()
    on_host_memory.memory_bytes = memory.weights + 2 * 5 * memory.cache // 16 + 5
    with runtime.load(compiled_engine, backend="cuda") as loaded:
        assert loaded._loaded.session.num_slots == 5
        assert loaded.memory().cache == 5 * memory.cache // 16
    on_host_memory.memory_bytes = 1 << 40
    with runtime.load(compiled_engine, backend="cuda", max_sequences=8) as loaded:
        assert loaded._loaded.session.num_slots == 8
    options = CudaOptions(slots=3, max_positions=400)
    with runtime.load(compiled_engine, options=options) as loaded:
        assert (loaded._loaded.session.num_slots, loaded._loaded.session.max_positions) == (3, 400)
    # As on the other back ends, options that say nothing are one slot.
    assert load_engine(compiled_engine, options=CudaOptions()).session.num_slots == 1
    with pytest.raises(EngineError, match="max_positions is 255; 256 or more were expected"):
        load_engine(compiled_engine, options=CudaOptions(max_positions=255))
    assert on_host_memory.devices[-1].closed


@pytest.mark.parametrize(("free", "expected"), [(0, 1), (99, 1), (100, 1), (139, 1), (140, 2), (10000, 16)])
def test_slots_that_fit(free, expected):
    assert slots_that_fit(free, 100, 10) == expected


def test_what_shared_passes_need_is_found_out_where_there_are_some(compiled_engine, on_host_memory, probed):
    """A session of one slot cannot: its record is another one."""
    for slots, measured in ((1, 1), (4, 2), (16, 2), (1, 2)):
        runtime.load(compiled_engine, backend="cuda", max_sequences=slots).close()
        assert len(probed) == measured


def mixture(random, slots):
    """Any batch: chunks of prompts, single tokens and chains after any length."""
    batch = []
    for slot in random.permutation(slots)[: random.integers(1, slots + 1)].tolist():
        width = int(random.choice([1, 1, int(random.integers(1, 33)), int(random.integers(1, 20))]))
        batch.append(
            Positions(
                tokens=np.zeros(width, np.int64),
                cache_length=int(random.integers(0, 400)),
                num_logits=int(random.choice([0, 1, width])),
                slot=slot,
            )
        )
    return batch


def test_few_graphs_serve_all_batches(compiled_engine, on_host_memory, probed, monkeypatch):
    random, rounds = np.random.default_rng(0), 1500
    mixtures = [mixture(random, 7) for _ in range(rounds)]
    shapes = {tuple((len(one.tokens), one.cache_length, one.num_logits) for one in batch) for batch in mixtures}
    assert len(shapes) > rounds * 9 // 10
    with runtime.load(compiled_engine, backend="cuda", max_sequences=7) as loaded:
        session, device = loaded._loaded.session, on_host_memory.devices[-1]
        for batch in mixtures:
            session.run_batch(batch)
        assert len(session._graphs._seen) < rounds / 3
        assert len(session._graphs) <= MOST_GRAPHS
        # Sequences that decode together for a while: one, whatever they have cached until the splits double.
        seen = len(session._graphs._seen)
        for length in range(300, 330):
            tokens = np.zeros(4, np.int64)
            batch = [Positions(tokens=tokens, cache_length=length, num_logits=4, slot=slot) for slot in range(5)]
            session.run_batch(batch)
        assert len(session._graphs._seen) <= seen + 1
        closed = []
        end_capture = device.end_capture

        def recorded():
            work = end_capture()
            monkeypatch.setattr(work, "close", lambda: closed.append(work))
            return work

        monkeypatch.setattr(device, "end_capture", recorded)
        monkeypatch.setattr("engines.cuda.graphs.MOST_GRAPHS", len(session._graphs))
        before = len(session._graphs)
        for width in (1, 2, 3):
            for _ in range(2):
                session.run(np.zeros(width, np.int64), 3, width)
        # The oldest made room, and was freed.
        assert len(session._graphs) == before
    # With the session, the others.
    assert len(closed) > 0


def test_prompts_are_recorded_where_sequences_share_passes(compiled_engine, on_host_memory, probed):
    """And what a pass of one sequence takes is what it takes with others."""
    with runtime.load(compiled_engine, backend="cuda", max_sequences=2) as loaded:
        session = loaded._loaded.session
        for _ in range(2):
            session.run(np.arange(100), 0, 100)
        assert len(session._graphs) == 1
        session.run_batch(
            [Positions(tokens=np.arange(60), cache_length=0, num_logits=50, slot=slot) for slot in (0, 1)]
        )
        sizes = {(one.tokens, one.rows) for one in session._graphs._seen}
        assert sizes == {(112, 112), (128, 112)}
        # A verify pass alone is not filled up.
        session.run(np.arange(3), 0, 2)
        assert (3, 2) in {(one.tokens, one.rows) for one in session._graphs._seen}
        # Logits that come in parts are copied between launches.
        seen = len(session._graphs._seen)
        logits = session.run_logits(np.arange(200), 0, 200)
        assert logits.shape == (200, session.contract.vocab_size)
        assert len(session._graphs._seen) == seen
