"""Whole verify passes timed, kernels against each other, beside what the machine's memory could deliver."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.directory import EngineDirectory
from engines.latency import LatencySurface, measure_interleaved
from engines.loading import load_opened
from engines.machine import usable_cores
from engines.onnxruntime.files import onnxruntime_files
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.onnxruntime.threads import share_threads
from plugins.cpu.library import find_library, read_memory
from quasar.errors import EngineError, QuasarError

# Well above any cache.
_READ_BYTES = 1 << 28
_READS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLatency:
    """Milliseconds of a pass: kernels → cached length → width → median.

    `bandwidth_gb_s`: what all threads together read of memory, in 10^9 bytes a second. `floor_ms`: cached
    length → reading packed weights and those positions once at that rate; None where the engine has no packed weights.
    """

    kernels: dict[str, str]
    ms: dict[str, LatencySurface]
    bandwidth_gb_s: float
    floor_ms: dict[int, float] | None

    def to_json(self) -> dict[str, Any]:
        """The command's JSON."""
        surfaces = {
            name: {
                str(length): {str(width): ms for width, ms in by_width.items()} for length, by_width in surface.items()
            }
            for name, surface in self.ms.items()
        }
        floor = None if self.floor_ms is None else {str(length): ms for length, ms in self.floor_ms.items()}
        return {
            "kernels": self.kernels,
            "ms": surfaces,
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "floor_ms": floor,
        }


def measure_pass_latency(
    directory: EngineDirectory,
    kernels: Sequence[str],
    *,
    widths: Sequence[int],
    cached_lengths: Sequence[int],
    threads: int = 0,
    repeats: int = 15,
    on_cached_length: Callable[[], None] = lambda: None,
) -> PassLatency:
    """Time passes of every kind of kernels in one process, interleaved on one thread pool.

    Raises:
        EngineError: a width or a cached length that the engine does not take, kernels that cannot run, or a shared
            thread pool of another size.
    """
    contract = directory.manifest.contract
    if not all(1 <= width <= contract.max_width for width in widths):
        raise EngineError(f"widths are {list(widths)}; 1 to {contract.max_width} were expected")
    if not all(1 <= count <= contract.max_length for count in cached_lengths):
        raise EngineError(
            f"cached lengths are {list(cached_lengths)}; "
            f"1 to {contract.max_length}, the engine's max length, were expected"
        )
    share_threads(threads)
    loaded = {name: load_opened(directory, options=OnnxRuntimeOptions(kernels=name)) for name in kernels}
    sessions = [one.session for one in loaded.values()]
    bandwidth = memory_bandwidth(threads or usable_cores())
    surfaces = measure_interleaved(
        sessions, lengths=cached_lengths, widths=widths, repeats=repeats, on_length=on_cached_length
    )
    names = {name: one.kernels for name, one in loaded.items()}
    for session in sessions:
        session.close()
    packed = onnxruntime_files(directory.manifest).native_weights
    floor = None
    if packed:
        weights = directory.manifest.files[packed]["bytes"]
        position_bytes = contract.cache_bytes // contract.capacity
        floor = {count: round((weights + count * position_bytes) / bandwidth / 1e6, 3) for count in cached_lengths}
    return PassLatency(
        kernels=names,
        ms=dict(zip(loaded, surfaces, strict=True)),
        bandwidth_gb_s=round(bandwidth, 1),
        floor_ms=floor,
    )


def memory_bandwidth(threads: int) -> float:
    """What `threads` threads together read of memory in the best of seven runs: 10^9 bytes a second."""
    size = _READ_BYTES // threads // 64 * 64
    parts = [np.ones(size // 4, np.float32) for _ in range(threads)]
    try:
        library: Path | None = find_library().path
    except QuasarError:
        library = None

    def read(part: "np.ndarray[Any, np.dtype[np.float32]]") -> None:
        if library is None:
            part.max()
        else:
            read_memory(library, part.ctypes.data, part.nbytes)

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READS):
            start = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - start)
    return threads * size / best / 1e9
