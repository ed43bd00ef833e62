"""The CUDA session on host memory, with the very kernels in Triton's interpreter: slow, and the same arithmetic."""

from collections.abc import Sequence
from pathlib import Path

from engines.contract import Contract
from engines.cuda.program import Program
from engines.cuda.session import CudaSession
from engines.gpu.device import LoadedKernel
from engines.gpu.host_device import HostDevice


def stand_in_session(
    program: Program, weights: Path, contract: Contract, *, memory_bytes: int = 1 << 40, graphs: bool = True
) -> CudaSession:
    """A session whose kernels are interpreted; only where TRITON_INTERPRET was 1 when Triton was imported."""
    from plugins.gpu.catalog import kernel_of  # it imports Triton
    from plugins.gpu.interpreter import interpret_at  # as above

    interpreted = {variant.name: kernel_of(variant) for variant in program.variants()}

    def run_kernel(kernel: LoadedKernel, grid: tuple[int, ...], arguments: Sequence[int | float]) -> None:
        interpret_at(interpreted[kernel.handle], grid, arguments)

    device = HostDevice(memory_bytes, run_kernel)
    kernels = {
        name: device.load_kernel(b"", name, threads=0, shared_bytes=0, types=tuple(kernel.signature.values()))
        for name, kernel in interpreted.items()
    }
    return CudaSession(program, weights, kernels, device, contract, graphs=graphs)
