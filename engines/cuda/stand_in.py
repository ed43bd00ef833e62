"""The CUDA session on host memory, with the very kernels in Triton's interpreter: slow, and the same arithmetic."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from engines.contract import Contract
from engines.cuda.draft_head import CudaDraftHead
from engines.cuda.program import Program
from engines.cuda.session import CudaSession
from engines.draft_head import DraftHeadFiles
from engines.gpu.device import LoadedKernel
from engines.gpu.host_device import HostDevice
from plugins.gpu.variants import Variant


def stand_in_device(memory_bytes: int = 1 << 40) -> HostDevice:
    """Host memory on which kernels are interpreted; only where TRITON_INTERPRET was 1 when Triton was imported."""

    def run_kernel(kernel: LoadedKernel, grid: tuple[int, ...], arguments: Sequence[int | float]) -> None:
        from plugins.gpu.interpreter import interpret_at  # it imports Triton

        interpret_at(kernel.handle, grid, arguments)

    return HostDevice(memory_bytes, run_kernel)


def stand_in_kernels(variants: Iterable[Variant]) -> dict[str, LoadedKernel]:
    """Kernels by name, as a `stand_in_device` takes them."""
    from plugins.gpu.catalog import kernel_of  # it imports Triton

    kernels = {variant.name: kernel_of(variant) for variant in variants}
    return {
        name: LoadedKernel(handle=kernel, threads=0, shared_bytes=0, types=tuple(kernel.signature.values()))
        for name, kernel in kernels.items()
    }


def stand_in_session(
    program: Program,
    weights: Path,
    contract: Contract,
    *,
    slots: int = 1,
    memory_bytes: int = 1 << 40,
    graphs: bool = True,
) -> CudaSession:
    """A session on a stand-in."""
    kernels, device = stand_in_kernels(program.variants()), stand_in_device(memory_bytes)
    return CudaSession(program, weights, kernels, device, contract, slots=slots, graphs=graphs)


def stand_in_sessions(
    verifier: Program,
    head: Program,
    weights: Path,
    contract: Contract,
    files: DraftHeadFiles,
    *,
    slots: int = 1,
    graphs: bool = True,
) -> tuple[CudaSession, CudaDraftHead]:
    """A session and its draft head's on one stand-in; `verifier`: the program that tells what the head reads."""
    device, kernels = stand_in_device(), stand_in_kernels((*verifier.variants(), *head.variants()))
    session = CudaSession(verifier, weights, kernels, device, contract, slots=slots, graphs=graphs)
    return session, CudaDraftHead(head, weights, kernels, device, files, session, graphs=graphs)
