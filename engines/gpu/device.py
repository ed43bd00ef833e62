"""What a session needs of the memory that its engine computes on: CUDA's, or the host's in its place."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quasar.errors import EngineError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU: its name, its compute capability ("8.9") and the driver's CUDA version ("13.0")."""

    name: str
    compute_capability: str
    driver: str


def array_at(address: int, size: int) -> Bytes:
    """The `size` bytes of host memory that begin at an address, as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class OutOfMemoryError(EngineError):
    """The device has no room for a buffer; the session that asked for it says what would fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedKernel:
    """A kernel that a device has loaded, and how it is launched (plugins.compiled)."""

    handle: Any
    threads: int
    shared_bytes: int
    types: tuple[str, ...]


class RecordedWork(Protocol):
    """Work that was captured from a stream, and can be launched again as a whole."""

    def launch(self) -> None:
        """Put it on the stream."""

    def close(self) -> None:
        """Free it."""


class Device(Protocol):
    """Memory, one stream, and copies on it. Everything is in the order of the stream but `allocate` and `close`."""

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""

    @property
    def multiprocessors(self) -> int:
        """How many there are: so many programs run at once, or a few times as many."""

    @property
    def free_bytes(self) -> int:
        """Memory that nobody uses."""

    def allocate(self, size: int) -> int:
        """The address of `size` zeroed bytes, at a multiple of 256; raises `OutOfMemoryError`."""

    def pinned(self, size: int) -> Bytes:
        """Zeroed host memory, uint8 [size], that copies run from and to without a detour."""

    def upload(self, address: int, source: Bytes) -> None:
        """Copy host bytes to an address."""

    def download(self, target: Bytes, address: int) -> None:
        """Copy bytes from an address to the host; they are there after `synchronize`."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def begin_capture(self) -> None:
        """Record what is put on the stream from now on instead of running it."""

    def end_capture(self) -> RecordedWork:
        """What was recorded; raises `EngineError` if the work could not be recorded."""

    def abandon_capture(self) -> None:
        """End a recording that failed; the stream is usable again."""

    def load_kernel(
        self, image: bytes, entry: str, *, threads: int, shared_bytes: int, types: Sequence[str]
    ) -> "LoadedKernel":
        """A kernel from a compiled image (plugins.compiled)."""

    def launch(
        self, kernel: "LoadedKernel", grid: tuple[int, ...], arguments: Sequence[int | float], *, overlap: bool = False
    ) -> None:
        """Run a kernel: pointers are addresses. `overlap`: it may start before the kernel before it has ended."""

    def close(self) -> None:
        """Free everything that was allocated here; a second call does nothing."""
