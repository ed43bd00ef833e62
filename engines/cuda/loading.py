"""From an engine directory to a CUDA session on this machine's GPU: the kernels that fit it, and its record."""

from dataclasses import dataclass, replace

from engines.cache_rows import CACHE_DTYPES
from engines.contract import Contract
from engines.cuda.files import (
    NAME,
    CudaFiles,
    KernelsFile,
    check_program,
    cuda_files,
    kernels_version,
    read_kernels,
    read_program,
)
from engines.cuda.load_options import CudaOptions
from engines.cuda.session import CudaSession
from engines.directory import EngineDirectory
from engines.gpu.device import Device, Gpu
from engines.gpu.driver import CudaDevice, find_gpu
from engines.gpu.limits import slots_that_fit
from engines.gpu.record import gpu_machine, gpu_record
from engines.probes.driver import ProbePlan, brief_plan
from engines.record import MachineRecord
from plugins.gpu.variants import BLOCK, KERNELS_VERSION, SPLIT
from quasar.errors import EngineError

# The oldest GPUs with the integer product that Triton compiles to.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a directory can run: the GPU, the files, and which of them has the kernels that fit it."""

    gpu: Gpu
    files: CudaFiles
    kernels: KernelsFile


def find_placement(directory: EngineDirectory) -> Placement:
    """Look for GPU and kernels, in this order; raises `EngineError` for the first that is missing."""
    gpu = find_gpu()
    if gpu.found is None:
        raise EngineError(f"backend {NAME!r} needs an NVIDIA GPU: {gpu.reason}; backend='onnxruntime' runs on the CPU")
    files, capability = cuda_files(directory.manifest), gpu.found.compute_capability
    command = f"python -m export compile {directory.path} --backend {NAME}"
    if tuple(map(int, capability.split("."))) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise EngineError(
            f"{gpu.found.name} has compute capability {capability}; backend {NAME!r} needs {least} or above, for its "
            "INT8 tensor cores: backend='onnxruntime' runs on the CPU"
        )
    if files is None:
        raise EngineError(f"{directory.path} has no {NAME} back end: run {command}")
    kernels = files.kernels_for(capability)
    if kernels is None:
        has = ", ".join(one.compute_capability for one in files.kernels) or "none"
        raise EngineError(
            f"{directory.path} has no kernels for this GPU ({gpu.found.name}, compute capability {capability}; "
            f"kernels: {has}): run {command} --compute-capability {capability}"
        )
    if kernels_version(directory.file(kernels.file)) != KERNELS_VERSION:
        raise EngineError(
            f"{directory.path} has kernels of another version for this GPU (compute capability {capability}), which "
            f"this version cannot launch: run {command} --compute-capability {capability}"
        )
    if _major(gpu.found.driver) < _major(kernels.cuda):
        raise EngineError(
            f"the NVIDIA driver is for CUDA {gpu.found.driver}, and the kernels for compute capability {capability} "
            f"need one for CUDA {_major(kernels.cuda)} or above: update the driver"
        )
    return Placement(gpu=gpu.found, files=files, kernels=kernels)


def _major(version: str) -> int:
    return int(version.split(".")[0])


def load_cuda(directory: EngineDirectory, options: CudaOptions) -> tuple[CudaSession, MachineRecord]:
    """A session on this machine's GPU, and what is known of its exactness and latencies.

    Raises:
        EngineError: no GPU, none that is new enough, no kernels for it, not enough memory, or an option that cannot be
            honoured.
    """
    placement = find_placement(directory)
    session = open_session(directory, placement, CudaDevice(), options)
    try:
        return session, _record(directory, placement, session)
    except BaseException:
        session.close()
        raise


def open_session(directory: EngineDirectory, placement: Placement, device: Device, options: CudaOptions) -> CudaSession:
    """The session on a device, which is closed with it, or if this fails."""
    files = placement.files
    try:
        contract, path = directory.manifest.contract, directory.file(files.program)
        program = read_program(path)
        check_program(path, program, contract)
        weights = directory.file(files.weights)
        kernels = {
            record.name: device.load_kernel(
                image, record.entry, threads=record.threads, shared_bytes=record.shared_bytes, types=record.types
            )
            for record, image in read_kernels(directory.file(placement.kernels.file))
        }
        slots = options.slots
        if slots is None:
            slot_bytes = contract.cache_values * CACHE_DTYPES[program.cache_type].itemsize
            slots = slots_that_fit(device.free_bytes, weights.stat().st_size, slot_bytes)
    except BaseException:
        device.close()
        raise
    return CudaSession(program, weights, kernels, device, contract, slots=slots, max_positions=options.max_positions)


def _record(directory: EngineDirectory, placement: Placement, session: CudaSession) -> MachineRecord:
    machine = gpu_machine(placement.gpu, "quasar kernels")
    compiled = directory.manifest.files[placement.kernels.file]["sha256"][:8]
    # A session of one slot does not find out what sequences that share passes need to know.
    compiled += "-shared" if session.max_sequences > 1 else ""
    return gpu_record(directory, compiled, machine, session, probe_plan(session.contract))


def probe_plan(contract: Contract) -> ProbePlan:
    """A brief one, with cached lengths around the places where attention goes on with another block or split."""
    totals = [BLOCK, 2 * BLOCK, SPLIT, SPLIT + BLOCK, 2 * SPLIT]
    around = [total + offset for total in totals for offset in (-2, -1, 0) if total + offset < contract.max_length - 2]
    return replace(brief_plan(contract), boundaries=around, least_rounds=6)
