"""Which plan is taken, and what is said where none can be: GPUs and libraries are stand-ins here."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import runtime
from engines import loading as engines_loading
from engines.directory import open_directory
from engines.gpu import record as gpu_record
from engines.gpu.device import Gpu
from engines.gpu.driver import CudaDevice, GpuSearch, find_gpu
from engines.gpu.host_device import HostDevice
from engines.tensorrt import backend, loading
from engines.tensorrt.host_memory import host_plan
from engines.tensorrt.inspector import integer_kernels
from engines.tensorrt.library import Library
from engines.tensorrt.plans import tensorrt_files
from engines.tensorrt.session import TensorRtSession
from export.build_options import CompileOptions
from export.compile import compile_engine
from quasar.errors import EngineError, GenerationError

ADA = Gpu(name="NVIDIA Ada", compute_capability="8.9", driver="13.1")
HOPPER = Gpu(name="NVIDIA Hopper", compute_capability="9.0", driver="13.1")


@pytest.fixture(scope="module")
def engine(tiny_engine, tmp_path_factory):
    directory = shutil.copytree(tiny_engine, tmp_path_factory.mktemp("loading") / "engine")
    compile_engine(CompileOptions(directory=directory, backend="tensorrt-rtx", compute_capabilities=("8.9",)))
    return directory


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine with a GPU, as far as looking goes."""

    def put(gpu):
        monkeypatch.setattr(loading, "find_gpu", lambda: GpuSearch(found=gpu, reason=""))

    return put


def one_line(engine, backend, **options):
    with pytest.raises(EngineError) as caught:
        runtime.load(engine, backend=backend, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu(engine, backend):
    assert one_line(engine, backend) == (
        f"backend '{backend}' needs an NVIDIA GPU: there is no NVIDIA driver on this machine; "
        "backend='onnxruntime' runs on the CPU"
    )
    assert find_gpu().found is None
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        CudaDevice()


def test_without_cuda_python(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "cuda-python is not installed: run pip install 'quasar-verifier[cuda]'" in one_line(engine, "tensorrt")


def test_without_the_library(engine, with_gpu):
    with_gpu(ADA)
    assert one_line(engine, "tensorrt") == "tensorrt is not installed: run pip install 'quasar-verifier[tensorrt]'"


def test_an_old_driver(engine, with_gpu):
    with_gpu(replace(ADA, driver="12.4"))
    assert "the NVIDIA driver supports CUDA 12.4, and tensorrt-rtx" in one_line(engine, "tensorrt-rtx")


def test_a_directory_without_that_back_end(tiny_engine, with_gpu):
    with_gpu(ADA)
    message = one_line(tiny_engine, "tensorrt-rtx")
    assert message.endswith(
        f"has no tensorrt-rtx back end: run python -m export compile {tiny_engine} --backend tensorrt-rtx"
    )


def test_a_plan_for_another_gpu(engine, with_gpu):
    with_gpu(HOPPER)
    assert one_line(engine, "tensorrt-rtx") == (
        f"{engine} has no plan for this GPU (NVIDIA Hopper, compute capability 9.0; plans: 8.9): run python -m export "
        f"compile {engine} --backend tensorrt-rtx, or load with rebuild=True"
    )


def test_a_plan_from_another_version(engine, with_gpu, monkeypatch):
    import tensorrt_rtx

    with_gpu(ADA)
    monkeypatch.setattr(tensorrt_rtx, "__version__", "2.0.0")
    message = one_line(engine, "tensorrt-rtx")
    assert "has a plan for this GPU (8.9) from tensorrt-rtx 1." in message
    assert "but 2.0.0 is installed, and plans do not load across versions: run python -m export compile" in message


def test_an_unknown_back_end(engine):
    assert one_line(engine, "abacus") == "unknown backend 'abacus'; known are onnxruntime, cuda, tensorrt, tensorrt-rtx"


def test_without_a_choice_the_machine_decides(engine, with_gpu, monkeypatch):
    assert runtime.load(engine).backend == "onnxruntime"
    with_gpu(HOPPER)
    assert runtime.load(engine).backend == "onnxruntime"
    with_gpu(ADA)
    asked = []
    monkeypatch.setattr(
        backend,
        "load_tensorrt",
        lambda directory, name, *, rebuild: asked.append((name, rebuild)) or (SimpleNamespace(), None),
    )
    assert engines_loading.load_engine(engine).backend == "tensorrt-rtx"
    assert asked == [("tensorrt-rtx", False)]
    assert engines_loading.load_engine(engine, backend="onnxruntime").backend == "onnxruntime"


@pytest.fixture
def on_host_memory(engine, with_gpu, monkeypatch, tmp_path):
    """`load_tensorrt` from end to end, the device and the deserialized plan being the host's."""
    import onnx_ir as ir

    from export.passes import LowerToTensorRt

    with_gpu(ADA)
    contract = open_directory(engine).manifest.contract
    model = ir.load(engine / "verifier.onnx")
    LowerToTensorRt(contract, "float32")(model)
    ir.save(model, tmp_path / "float32.onnx")
    devices = []

    def device():
        devices.append(HostDevice())
        return devices[-1]

    monkeypatch.setattr(loading, "CudaDevice", device)
    monkeypatch.setattr(
        loading,
        "_deserialize",
        lambda placement, data: host_plan(tmp_path / "float32.onnx", engine, contract, devices[-1], threads=1),
    )
    return devices


def test_loading_measures_once_and_generates(engine, on_host_memory, monkeypatch):
    measured = []
    monkeypatch.setattr(gpu_record, "run_probes", measuring(measured, gpu_record.run_probes))
    with runtime.load(engine, backend="tensorrt-rtx") as loaded:
        assert loaded.backend == "tensorrt-rtx"
        assert isinstance(loaded._loaded.session, TensorRtSession)
        record = loaded.record
        assert record.machine["processor"] == "NVIDIA Ada"
        # Standard attention on the CPU gives a single row bits of its own, so plain decoding is fed two.
        assert record.row_invariance.chain == 2
        assert set(record.cost_surface_ms[256]) == {1, 2, 3, 4, 6, 8, 12, 16}
        plain = loaded.generate("say it again, say it again", max_new_tokens=24, drafter="none")
        speculative = loaded.generate("say it again, say it again", max_new_tokens=24)
        assert plain.token_ids == speculative.token_ids
        assert loaded.logits([1, 2, 3]).shape == (320,)
    assert on_host_memory[-1].closed
    again = runtime.load(engine, backend="tensorrt-rtx")
    assert len(measured) == 1
    assert again.record == record
    stream = again.stream("hello", max_new_tokens=8)
    next(stream)
    again.close()
    assert on_host_memory[-1].closed
    with pytest.raises(GenerationError, match="this engine is closed"):
        list(stream)


def test_another_plan_is_measured_again(engine, on_host_memory, monkeypatch):
    """It may compute in another order."""
    measured = []
    monkeypatch.setattr(gpu_record, "run_probes", measuring(measured, gpu_record.run_probes))
    runtime.load(engine, backend="tensorrt-rtx").close()
    plan_bytes = loading._plan_bytes
    monkeypatch.setattr(loading, "_plan_bytes", lambda *args, **options: plan_bytes(*args, **options) + b"another")
    for _ in range(2):
        runtime.load(engine, backend="tensorrt-rtx").close()
    assert len(measured) == 2


def measuring(calls, original):
    def measure(session, machine, plan):
        calls.append(machine)
        return original(session, machine, plan)

    return measure


def test_a_missing_plan_is_compiled_into_the_users_cache(engine, on_host_memory, with_gpu, monkeypatch):
    with_gpu(HOPPER)
    compiled = []

    def compile_plan(library, graph, data_folder, contract):
        assert isinstance(library, Library)
        compiled.append(graph)
        return SimpleNamespace(data=b"plan")

    monkeypatch.setattr(loading, "compile_plan", compile_plan)
    for _ in range(2):
        runtime.load(engine, backend="tensorrt-rtx", rebuild=True).close()
    [graph] = compiled
    assert graph == engine / tensorrt_files(open_directory(engine).manifest)["tensorrt-rtx"].graph
    runtime.load(engine, backend="tensorrt-rtx").close()


def test_a_failing_load_frees_the_device(engine, on_host_memory, monkeypatch):
    def fail(session, machine, plan):
        raise EngineError("no room")

    monkeypatch.setattr(gpu_record, "run_probes", fail)
    with pytest.raises(EngineError, match="no room"):
        runtime.load(engine, backend="tensorrt-rtx")
    assert on_host_memory[-1].closed


def test_the_gpu_suite_refuses_politely_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the GPU suite needs an NVIDIA GPU: there is no NVIDIA driver on this machine" in done.stdout + done.stderr


def test_integer_kernels_are_known_by_their_names():
    layers = [
        {"Name": "a", "TacticName": "sm80_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize64x64x64_stage3_imma"},
        {"Name": "b", "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64_hmma"},
        {"Name": "__myl_MulCast_int8", "TacticName": ""},
        {"Name": "c"},
    ]
    assert integer_kernels(layers) == ["__myl_MulCast_int8", layers[0]["TacticName"]]
