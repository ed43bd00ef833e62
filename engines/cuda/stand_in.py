"""The CUDA session on host memory, with the very kernels in Triton's interpreter: slow, and the same arithmetic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.contract import Contract
from engines.cuda.program import Program
from engines.cuda.session import CudaSession
from engines.gpu.device import LoadedKernel
from engines.gpu.host_device import HostDevice, host_array

# Triton's words for what pointers point to, and numpy's types with elements of that size.
_ELEMENTS = {"i8": np.int8, "i32": np.int32, "i64": np.int64, "fp32": np.float32, "fp16": np.float16, "bf16": np.int16}


def stand_in_session(
    program: Program, weights: Path, contract: Contract, *, memory_bytes: int = 1 << 40, graphs: bool = True
) -> CudaSession:
    """A session whose kernels are interpreted; only where TRITON_INTERPRET was 1 when Triton was imported."""
    from plugins.gpu.catalog import kernel_of  # it imports Triton
    from plugins.gpu.interpreter import interpret  # as above

    interpreted = {variant.name: kernel_of(variant) for variant in program.variants()}

    def run_kernel(kernel: LoadedKernel, grid: tuple[int, ...], arguments: Sequence[int | float]) -> None:
        values = [_argument(kind, value) for kind, value in zip(kernel.types, arguments, strict=True)]
        interpret(interpreted[kernel.handle], grid, values)

    device = HostDevice(memory_bytes, run_kernel)
    kernels = {
        name: device.load_kernel(b"", name, threads=0, shared_bytes=0, types=tuple(kernel.signature.values()))
        for name, kernel in interpreted.items()
    }
    return CudaSession(program, weights, kernels, device, contract, graphs=graphs)


def _argument(kind: str, value: float) -> Any:
    """A pointer as a torch tensor of one element at its address, which is what the interpreter takes."""
    import torch

    if not kind.startswith("*"):
        return value
    element = np.dtype(_ELEMENTS[kind[1:]])
    tensor = torch.from_numpy(host_array(int(value), (1,), element) if value else np.zeros(1, element))
    return tensor.view(torch.bfloat16) if kind == "*bf16" else tensor
