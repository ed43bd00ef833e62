"""From an engine directory to a TensorRT session on this machine's GPU: the plan that fits, its record, its kernel."""

import contextlib
import logging
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from engines.contract import Contract
from engines.directory import EngineDirectory
from engines.gpu.device import Gpu, LoadedKernel
from engines.gpu.driver import CudaDevice, find_gpu
from engines.gpu.record import gpu_machine, gpu_record
from engines.machine import user_cache
from engines.probes.driver import ProbePlan, brief_plan
from engines.record import MachineRecord
from engines.tensorrt.builder import compile_plan, open_log
from engines.tensorrt.library import Library, LibraryName, check_driver, open_library
from engines.tensorrt.plans import TensorRtFiles, tensorrt_files
from engines.tensorrt.session import LoadedPlan, TensorRtSession
from plugins.kv_compact import ARGUMENT_TYPES
from quasar.errors import EngineError
from quasar.files import atomic_path

_log = logging.getLogger("quasar.engines")
# Totals around which attention kernels change their path, if they do: every 64 positions, and one more.
_BOUNDARY_STEP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a directory can run: the library, the GPU, and the plan's file, None if there is none that fits."""

    library: Library
    gpu: Gpu
    files: TensorRtFiles
    plan: Path | None


def find_placement(directory: EngineDirectory, name: LibraryName) -> Placement:
    """Look for GPU, library and plan, in this order; raises `EngineError` for the first that is missing."""
    gpu = find_gpu()
    if gpu.found is None:
        raise EngineError(f"backend {name!r} needs an NVIDIA GPU: {gpu.reason}; backend='onnxruntime' runs on the CPU")
    library = open_library(name)
    check_driver(library, gpu.found.driver)
    files = tensorrt_files(directory.manifest).get(name)
    if files is None:
        raise EngineError(f"{directory.path} has no {name} back end: run {_command(directory, name)}")
    wanted = {"version": library.version, "compute_capability": gpu.found.compute_capability}
    fitting = next((plan for plan in files.plans if plan.fits(**wanted)), None)
    plan = None if fitting is None else directory.file(fitting.file)
    return Placement(library=library, gpu=gpu.found, files=files, plan=plan)


def load_tensorrt(
    directory: EngineDirectory, name: LibraryName, *, rebuild: bool = False
) -> tuple[TensorRtSession, MachineRecord]:
    """A session on this machine's GPU, and what is known of its exactness and latencies.

    Args:
        rebuild: where no plan fits this GPU and library, compile one into the user's cache.

    Raises:
        EngineError: no GPU, library or plan; the plan cannot be loaded; or it does not fit the GPU's memory.
    """
    placement = find_placement(directory, name)
    data = _plan_bytes(directory, placement, rebuild=rebuild)
    device = CudaDevice()
    try:
        session = TensorRtSession(
            _deserialize(placement, data),
            device,
            directory.manifest.contract,
            kernel=_kernel(directory, placement, device),
        )
    except BaseException:
        device.close()
        raise
    try:
        return session, _record(directory, placement, session, sha256(data).hexdigest()[:8])
    except BaseException:
        session.close()
        raise


def explain_misfit(directory: EngineDirectory, placement: Placement) -> str:
    """Why no plan of the directory runs here, and the command that makes one."""
    name, version = placement.library.name, placement.library.version
    capability, plans = placement.gpu.compute_capability, placement.files.plans
    command = f"run {_command(directory, name)}, or load with rebuild=True"
    same_gpu = sorted({plan.version for plan in plans if plan.compute_capability == capability})
    if same_gpu:
        return (
            f"{directory.path} has a plan for this GPU ({capability}) from {name} {', '.join(same_gpu)}, but {version} "
            f"is installed, and plans do not load across versions: {command}"
        )
    has = ", ".join(sorted({plan.compute_capability for plan in plans})) or "none"
    return (
        f"{directory.path} has no plan for this GPU ({placement.gpu.name}, compute capability {capability}; plans: "
        f"{has}): {command}"
    )


def _command(directory: EngineDirectory, name: LibraryName) -> str:
    return f"python -m export compile {directory.path} --backend {name}"


def _plan_bytes(directory: EngineDirectory, placement: Placement, *, rebuild: bool) -> bytes:
    if placement.plan is not None:
        return placement.plan.read_bytes()
    library, files = placement.library, placement.files
    of_engine = f"{directory.manifest.engine_hash[:16]}-{_hash_of(directory, files.graph)}"
    of_machine = f"{library.name}-{library.version}-sm{placement.gpu.compute_capability.replace('.', '')}"
    cached = user_cache() / "plans" / f"{of_engine}-{of_machine}-{files.compute_type}.plan"
    with contextlib.suppress(OSError):
        return cached.read_bytes()
    if not rebuild:
        raise EngineError(explain_misfit(directory, placement))
    _log.info("%s has no plan for this GPU: compiling one into %s", directory.path, cached)
    compiled = compile_plan(library, directory.file(files.graph), directory.path, directory.manifest.contract)
    try:
        with atomic_path(cached) as temporary:
            temporary.write_bytes(compiled.data)
    except OSError as error:
        _log.warning("the plan cannot be kept in %s (%s): the next load compiles again", cached, error)
    return compiled.data


def _hash_of(directory: EngineDirectory, file: str) -> str:
    """What tells a file of a back end from an earlier one: the engine's hash does not."""
    return str(directory.manifest.files[file]["sha256"])[:8]


def _deserialize(placement: Placement, data: bytes) -> LoadedPlan:
    library = placement.library
    log = open_log(library)
    runtime = library.module.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"{library.name} {library.version} cannot load the plan: {log.last or 'it gave no reason'}")
    strategy = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
    if not library.ahead_of_time:
        return LoadedPlan(
            engine=engine, context_argument=strategy, plan_bytes=len(data), last_error=lambda: str(log.last),
            keep_alive=(runtime,),
        )  # fmt: skip
    # TensorRT-RTX compiles its kernels when a plan first runs; what it compiled serves the next load, too.
    path = user_cache() / "kernels" / f"{library.name}-{library.version}-{placement.gpu.compute_capability}.cache"
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    # The default swaps in kernels for the shape at hand when a thread has compiled them: bits would change mid-run.
    config.dynamic_shapes_kernel_specialization_strategy = library.module.DynamicShapesKernelSpecializationStrategy.NONE
    cache = config.create_runtime_cache()
    with contextlib.suppress(OSError):
        cache.deserialize(path.read_bytes())
    config.set_runtime_cache(cache)

    def keep_kernels() -> None:
        with contextlib.suppress(OSError), atomic_path(path) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))

    return LoadedPlan(
        engine=engine, context_argument=config, plan_bytes=len(data), last_error=lambda: str(log.last),
        before_close=keep_kernels, keep_alive=(runtime, cache),
    )  # fmt: skip


def _kernel(directory: EngineDirectory, placement: Placement, device: CudaDevice) -> LoadedKernel | None:
    capability = placement.gpu.compute_capability
    found = next((one for one in placement.files.kernels if one.compute_capability == capability), None)
    if found is None:
        return None
    image = directory.file(found.file).read_bytes()
    return device.load_kernel(
        image, found.entry, threads=found.threads, shared_bytes=found.shared_bytes, types=ARGUMENT_TYPES
    )


def _record(directory: EngineDirectory, placement: Placement, session: TensorRtSession, plan: str) -> MachineRecord:
    """`plan`: its hash. Another plan may compute in another order."""
    library = placement.library
    machine = gpu_machine(placement.gpu, f"{library.name} {library.version}")
    compiled = f"{placement.files.compute_type}-{plan}"
    return gpu_record(directory, compiled, machine, session, probe_plan(session.contract))


def probe_plan(contract: Contract) -> ProbePlan:
    """A brief one; TensorRT has no cut-down plan, so boundaries are looked for where kernels may have them."""
    around = [
        length
        for total in range(_BOUNDARY_STEP, contract.max_length - 2, _BOUNDARY_STEP)
        for length in (total - 2, total - 1, total)
    ]
    return replace(brief_plan(contract), boundaries=around, least_rounds=6)
