"""Where the steps of benchmarks/gpu.py run: this machine's GPU, or in a rehearsal memory and Triton's interpreter."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from engines.cuda.program import Program
from engines.cuda.session import CudaSession
from engines.cuda.stand_in import stand_in_device, stand_in_kernels, stand_in_session
from engines.gpu.device import Device, LoadedKernel
from engines.gpu.driver import CudaDevice
from plugins.compiled import CompiledKernel
from plugins.gpu.catalog import kernel_of
from plugins.gpu.variants import Variant


class Runner:
    """Launches single kernels on arrays, and opens sessions. `rehearse`: without a GPU."""

    def __init__(self, *, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.compile_seconds = 0.0
        self._compiled: dict[str, CompiledKernel] = {}

    def device(self) -> Device:
        """A device of its own."""
        return stand_in_device() if self.rehearse else CudaDevice()

    def load(self, device: Device, variants: Iterable[Variant]) -> dict[str, LoadedKernel]:
        """Kernels of variants on a device: compiled here for its compute capability."""
        if not isinstance(device, CudaDevice):
            return stand_in_kernels(variants)
        start = time.perf_counter()
        loaded = {}
        for variant in variants:
            if variant.name not in self._compiled:
                self._compiled[variant.name] = kernel_of(variant).compile(device.gpu.compute_capability)
            made = self._compiled[variant.name]
            loaded[variant.name] = device.load_kernel(
                made.image, made.entry, threads=made.threads, shared_bytes=made.shared_bytes, types=made.types
            )
        self.compile_seconds += time.perf_counter() - start
        return loaded

    def session(
        self, program: Program, weights: Path, contract: Contract, *, slots: int = 1, overlap: bool = False
    ) -> CudaSession:
        """A session on the GPU, or on its stand-in; `overlap` where the GPU can."""
        if self.rehearse:
            return stand_in_session(program, weights, contract, slots=slots)
        device = CudaDevice()
        kernels = self.load(device, program.variants())
        overlap = overlap and overlaps(device)
        return CudaSession(program, weights, kernels, device, contract, slots=slots, overlap=overlap)


def overlaps(device: CudaDevice) -> bool:
    """Whether kernels may start before those before them have ended."""
    return int(device.gpu.compute_capability.split(".")[0]) >= 9


class Arrays:
    """Arrays on a device, for one kernel at a time."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.device = runner, runner.device()
        self._kernels: dict[str, LoadedKernel] = {}

    def put(self, array: NDArray[Any]) -> int:
        """Copy an array to the device; its address there."""
        data = np.ascontiguousarray(array)
        address = self.device.allocate(data.nbytes)
        self.device.upload(address, data.view(np.uint8).reshape(-1))
        self.device.synchronize()
        return address

    def get(self, address: int, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        """Copy it back."""
        array = np.empty(shape, dtype)
        self.device.download(array.view(np.uint8).reshape(-1), address)
        self.device.synchronize()
        return array

    def run(self, variant: Variant, grid: tuple[int, ...], arguments: Sequence[int | float]) -> None:
        """Launch a kernel, and wait for it."""
        if variant.name not in self._kernels:
            self._kernels |= self._runner.load(self.device, [variant])
        self.device.launch(self._kernels[variant.name], grid, arguments)
        self.device.synchronize()

    def close(self) -> None:
        """Free everything."""
        self.device.close()
