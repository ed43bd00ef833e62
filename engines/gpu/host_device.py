"""Host memory in place of a GPU, on any machine: sessions of GPU back ends run on it. Speed cannot be seen there."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engines.gpu.device import Bytes, LoadedKernel, OutOfMemoryError, array_at
from plugins.kv_compact import ARGUMENT_TYPES, kv_compact
from quasar.errors import EngineError

# Runs a launch: the kernel, its grid, its arguments.
KernelRunner = Callable[[LoadedKernel, tuple[int, ...], Sequence[int | float]], None]

_ALIGNMENT = 256
_STREAM = 1


class HostDevice:
    """A device whose memory is the host's, and whose stream runs everything at once."""

    def __init__(self, memory_bytes: int = 1 << 40, run_kernel: KernelRunner | None = None) -> None:
        """Nothing is allocated yet.

        Args:
            memory_bytes: more than this is refused.
            run_kernel: runs what is launched; None: kv_compact's reference, the one kernel that needs no Triton.
        """
        self._run_kernel = _run_reference if run_kernel is None else run_kernel
        self.free_bytes = memory_bytes
        self._blocks: list[Bytes] = []
        self._recording: list[Callable[[], None]] | None = None
        self.closed = False

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return _STREAM

    @property
    def multiprocessors(self) -> int:
        """As many as a small GPU's few programs keep busy, so that linears are split here, too."""
        return 2

    def allocate(self, size: int) -> int:
        """The address of zeroed memory."""
        if size > self.free_bytes:
            raise OutOfMemoryError(f"{size} bytes do not fit the {self.free_bytes} that are free")
        self.free_bytes -= size
        block = np.zeros(size + _ALIGNMENT, np.uint8)
        self._blocks.append(block)
        return -(-block.ctypes.data // _ALIGNMENT) * _ALIGNMENT

    def pinned(self, size: int) -> Bytes:
        """Zeroed host memory."""
        return np.zeros(size, np.uint8)

    def upload(self, address: int, source: Bytes) -> None:
        """Copy to an address."""
        self.enqueue(lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes))

    def download(self, target: Bytes, address: int) -> None:
        """Copy from an address."""
        self.enqueue(lambda: ctypes.memmove(target.ctypes.data, address, target.nbytes))

    def enqueue(self, work: Callable[[], Any]) -> None:
        """Run it now, or record it."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def synchronize(self) -> None:
        """Everything has run already; while recording, waiting is an error as it is on a GPU."""
        self._refuse_while_recording()

    def _refuse_while_recording(self) -> None:
        if self._recording is not None:
            raise EngineError("CUDA reports CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: the stream is being recorded")

    def begin_capture(self) -> None:
        """Record from now on. As on a GPU, not twice at once."""
        self._refuse_while_recording()
        self._recording = []

    def end_capture(self) -> "HostWork":
        """What was recorded."""
        recorded, self._recording = self._recording, None
        return HostWork(recorded or [])

    def abandon_capture(self) -> None:
        """Forget what was recorded."""
        self._recording = None

    def load_kernel(
        self,
        image: bytes,  # noqa: ARG002 - an image is of no use here
        entry: str,
        *,
        threads: int,
        shared_bytes: int,
        types: Sequence[str],
    ) -> LoadedKernel:
        """The kernel by its name."""
        return LoadedKernel(handle=entry, threads=threads, shared_bytes=shared_bytes, types=tuple(types))

    def launch(
        self,
        kernel: LoadedKernel,
        grid: tuple[int, ...],
        arguments: Sequence[int | float],
        *,
        overlap: bool = False,  # noqa: ARG002 - everything runs at once here
    ) -> None:
        """Run it."""
        arguments = tuple(arguments)
        self.enqueue(lambda: self._run_kernel(kernel, grid, arguments))

    def close(self) -> None:
        """Free everything."""
        self._blocks.clear()
        self.closed = True


class HostWork:
    """Recorded work."""

    def __init__(self, steps: list[Callable[[], None]]) -> None:
        self._steps = steps

    def launch(self) -> None:
        """Run it again."""
        for step in self._steps:
            step()

    def close(self) -> None:
        """Forget it."""
        self._steps = []


def host_kernel() -> LoadedKernel:
    """kv_compact on a `HostDevice`."""
    return LoadedKernel(handle="kv_compact", threads=128, shared_bytes=0, types=ARGUMENT_TYPES)


def host_array(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """The numpy array of a type and shape that begins at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return array_at(address, size).view(dtype).reshape(shape)


def _run_reference(kernel: LoadedKernel, grid: tuple[int, ...], arguments: Sequence[int | float]) -> None:
    """kv_compact's reference on the caches that the table names."""
    if kernel.handle != "kv_compact":
        raise EngineError(f"the stand-in for a GPU has no kernel {kernel.handle}")
    table, path_table, cache_length, path_length, capacity, words = map(int, arguments)
    caches = [
        host_array(int(address), (grid[1], capacity, words), np.dtype(np.int32))
        for address in host_array(table, (grid[0],), np.dtype(np.int64))
    ]
    kv_compact(caches, cache_length, host_array(path_table, (path_length,), np.dtype(np.int64)))
