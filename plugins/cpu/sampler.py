"""sample_token in C++: the same draw as the reference's, about ten times as fast."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np

from plugins.sample_token import Filters, Float32, check_largest
from quasar.errors import FaultError, QuasarError

# The largest int64.
_MOST = (1 << 63) - 1


class _Sampling(ctypes.Structure):
    # struct Sampling of native/kernels.hpp.
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
    )


class NativeSampler:
    """Draws with the instruction level that the library at `path` chooses. Holds no state: threads may share it.

    Raises `QuasarError` where the library has no level for this CPU.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.quasar_choose_level.restype = ctypes.c_void_p
        self._level = library.quasar_choose_level()
        if not self._level:
            raise QuasarError("QUASAR_CPU_LEVEL names a level that is unknown, or that this CPU lacks")
        self._draw = library.quasar_sample
        self._draw.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Sampling), ctypes.POINTER(ctypes.c_int64)]

    def __call__(self, logits: Float32, filters: Filters, *, seed: int, position: int) -> int:
        """As `plugins.sample_token.sample_token`."""
        return self.prepare(filters, seed)(logits, position)

    def prepare(self, filters: Filters, seed: int) -> Callable[[Float32, int], int]:
        """The draws of one generation: a function of logits and position, for one thread at a time."""
        sampling = _Sampling(
            None, 0, filters.temperature, min(filters.top_k, _MOST), filters.top_p, filters.min_p, seed, 0
        )
        token = ctypes.c_int64()
        arguments = (self._level, ctypes.byref(sampling), ctypes.byref(token))
        function = self._draw

        def draw(logits: Float32, position: int) -> int:
            row = logits
            if row.dtype != np.float32 or not (row.flags.c_contiguous and row.flags.aligned):
                row = np.require(logits, np.float32, ["C", "A"])
            sampling.logits = row.__array_interface__["data"][0]
            sampling.columns, sampling.position = len(row), position
            if function(*arguments):
                # Logits that no token can be drawn from, or else memory.
                check_largest(float(row.max()))
                raise FaultError("there is no memory to sample in")
            return token.value

        return draw
