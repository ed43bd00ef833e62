"""The compiled operator library: is there one, does this machine run it, and with which instructions."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

from plugins.cpu import toolchain
from quasar.errors import QuasarError

# What the Python side and the library must agree on: operator schemas and the packing of weights.
ABI = 4
# Of its operators in a graph.
DOMAIN = "quasar.cpu"
# Slower than stock kernels: only used where QUASAR_CPU_LEVEL asks for it.
_SLOW_LEVELS = ("portable",)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """The library's file and the instruction level that it chose: "avx512-vnni", "avx-vnni", "avx2", "neon-dot"."""

    path: Path
    level: str


def find_library(path: Path | None = None) -> NativeLibrary:
    """As `open_library`, tried in ONNX Runtime as well.

    Raises:
        QuasarError: there is none, or it cannot be used here; one line that says why.
    """
    library = open_library(path)
    _try_registering(library.path)
    return library


def open_library(path: Path | None = None) -> NativeLibrary:
    """The library of this installation, or the one at `path`; ONNX Runtime is not needed.

    Raises:
        QuasarError: there is none, or it cannot be used here; one line that says why.
    """
    path = toolchain.LIBRARY if path is None else path
    if not path.is_file():
        if path != toolchain.BUILT:
            raise QuasarError(f"there is no library of native operators at {path}")
        raise QuasarError("no native operators were compiled when this was installed (a C++ compiler is needed)")
    try:
        library = ctypes.CDLL(str(path))
        abi = library.quasar_abi()
        library.quasar_level.restype = ctypes.c_char_p
        level = library.quasar_level().decode()
    except (OSError, AttributeError) as error:
        raise QuasarError(f"{path} cannot be used here: {error}") from None
    if abi != ABI:
        raise QuasarError(f"{path} has operators of version {abi}, {ABI} was expected: install again")
    if not level:
        raise QuasarError("QUASAR_CPU_LEVEL names a level that is unknown, or that this CPU lacks")
    return NativeLibrary(path=path, level=level)


def read_memory(path: Path, address: int, size_bytes: int) -> None:
    """Read memory once from one thread, as fast as the machine gives it; Python's lock is free meanwhile."""
    library = ctypes.CDLL(str(path))
    library.quasar_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.quasar_read.restype = ctypes.c_uint64
    library.quasar_read(address, size_bytes)


def is_slow(library: NativeLibrary) -> bool:
    """Whether stock kernels are faster than this library is here."""
    return library.level in _SLOW_LEVELS


def _try_registering(path: Path) -> None:
    import onnxruntime as ort

    try:
        ort.SessionOptions().register_custom_ops_library(str(path))
    except Exception as error:  # the library's errors share no public base
        raise QuasarError(f"{path} is refused by ONNX Runtime {ort.__version__}: {error}") from None
