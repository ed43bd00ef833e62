"""From an engine directory to a CUDA session on this machine's GPU: the kernels that fit it, and its record."""

import logging
from dataclasses import dataclass, replace

from engines.cache_rows import CACHE_DTYPES
from engines.contract import Contract
from engines.cuda.draft_head import CudaDraftHead
from engines.cuda.files import (
    NAME,
    CudaFiles,
    CudaHeadFiles,
    KernelsFile,
    check_program,
    cuda_files,
    has_cuda_head,
    kernels_version,
    read_kernels,
    read_program,
)
from engines.cuda.load_options import CudaOptions
from engines.cuda.program import Program
from engines.cuda.session import CudaSession
from engines.directory import EngineDirectory
from engines.draft_head import DraftHeadFiles
from engines.gpu.device import Device, Gpu
from engines.gpu.driver import CudaDevice, find_gpu
from engines.gpu.limits import slots_that_fit
from engines.gpu.record import gpu_machine, gpu_record
from engines.probes.driver import ProbePlan, brief_plan
from engines.record import MachineRecord
from plugins.gpu.variants import BLOCK, KERNELS_VERSION, SPLIT
from quasar.errors import EngineError

_log = logging.getLogger("quasar.engines")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """The verifier's, and its draft head's where there is one."""

    verifier: CudaSession
    head: CudaDraftHead | None = None


def load_cuda(directory: EngineDirectory, options: CudaOptions) -> tuple[Sessions, MachineRecord]:
    """Sessions on this machine's GPU, and what is known of the verifier's exactness and latencies.

    Raises:
        EngineError: no GPU, none that is new enough, no kernels for it, not enough memory, or an option that cannot be
            honoured.
    """
    placement = find_placement(directory)
    sessions = open_sessions(directory, placement, CudaDevice(), options)
    try:
        return sessions, _record(directory, placement, sessions)
    except BaseException:
        sessions.verifier.close()
        raise


def open_sessions(directory: EngineDirectory, placement: Placement, device: Device, options: CudaOptions) -> Sessions:
    """The sessions on a device, which is closed with the verifier's, or if this fails."""
    files, contract = placement.files, directory.manifest.contract
    try:
        head = _head_of(directory, files, options)
        program = _program(directory, files.program if head is None else head.compiled.verifier, contract)
        own = None if head is None else _program(directory, head.compiled.program, head.files.contract(contract))
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
            if head is not None and own is not None:
                slot_bytes += head.files.contract(contract).cache_values * CACHE_DTYPES[own.cache_type].itemsize
            slots = slots_that_fit(device.free_bytes, weights.stat().st_size, slot_bytes)
    except BaseException:
        device.close()
        raise
    verifier = CudaSession(
        program, weights, kernels, device, contract, slots=slots, max_positions=options.max_positions
    )
    if head is None or own is None:
        return Sessions(verifier=verifier)
    try:
        return Sessions(verifier=verifier, head=CudaDraftHead(own, weights, kernels, device, head.files, verifier))
    except BaseException:
        verifier.close()
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The engine's draft head, and what was compiled of it."""

    files: DraftHeadFiles
    compiled: CudaHeadFiles


def _head_of(directory: EngineDirectory, files: CudaFiles, options: CudaOptions) -> _Head | None:
    """The engine's draft head, if it is wanted and was compiled."""
    head, compiled = directory.manifest.draft_head, files.draft_head
    if head is None or not options.draft_head:
        return None
    if compiled is None or not has_cuda_head(directory.manifest):
        _log.warning(
            "the draft head of %s was not compiled for %s, which goes without it: run python -m export compile %s "
            "--backend %s",
            directory.path,
            NAME,
            directory.path,
            NAME,
        )
        return None
    return _Head(files=head, compiled=compiled)


def _program(directory: EngineDirectory, file: str, contract: Contract) -> Program:
    path = directory.file(file)
    program = read_program(path)
    check_program(path, program, contract)
    return program


def _record(directory: EngineDirectory, placement: Placement, sessions: Sessions) -> MachineRecord:
    machine = gpu_machine(placement.gpu, "quasar kernels")
    compiled = directory.manifest.files[placement.kernels.file]["sha256"][:8]
    # A session of one slot does not find out what sequences that share passes need to know; and what a head reads takes
    # time.
    compiled += "-shared" if sessions.verifier.max_sequences > 1 else ""
    compiled += "-head" if sessions.head is not None else ""
    session = sessions.verifier
    return gpu_record(directory, compiled, machine, session, probe_plan(session.contract))


def probe_plan(contract: Contract) -> ProbePlan:
    """A brief one, with cached lengths around the places where attention goes on with another block or split."""
    totals = [BLOCK, 2 * BLOCK, SPLIT, SPLIT + BLOCK, 2 * SPLIT]
    around = [total + offset for total in totals for offset in (-2, -1, 0) if total + offset < contract.max_length - 2]
    return replace(brief_plan(contract), boundaries=around, least_rounds=6)
