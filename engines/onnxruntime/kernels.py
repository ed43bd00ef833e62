"""Which kernels an ONNX Runtime session runs: its own, or the native operators of `plugins/cpu`."""

import os
from dataclasses import dataclass
from pathlib import Path

from engines.contract import KV_DTYPES
from engines.manifest import Manifest
from engines.onnxruntime.files import OnnxRuntimeFiles, onnxruntime_files
from plugins.cpu.library import find_library, is_slow
from quasar.errors import EngineError, QuasarError

STOCK, NATIVE = "stock", "native"
_BUILD_WHOLE = "build it again without --kernels native"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """A choice of kernels.

    `library`: what native graphs need; None for stock kernels. `level`: its instructions, or "". `reason`: why native
    kernels do not run, where nobody asked for stock ones.
    """

    library: Path | None = None
    level: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """What people and records read: "native avx512-vnni", or "stock"."""
        return f"{NATIVE} {self.level}" if self.library is not None else STOCK

    @property
    def fixed_order(self) -> bool:
        """Whether attention's order of summation is written down, as the native operator's is."""
        return self.library is not None


def check_library() -> None:
    """Raise `EngineError` where ONNX Runtime is not installed."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise EngineError("ONNX Runtime is not installed: run pip install 'quasar-verifier[cpu]' (or [gpu])") from None


def slot_bytes(manifest: Manifest, wanted: str | None) -> int:
    """Memory of one slot of the KV cache on the kernels that `choose_kernels` takes: stock ones have float32 alone.

    Raises `EngineError` where ONNX Runtime is not installed, or as `choose_kernels`.
    """
    check_library()
    contract = manifest.contract
    if choose_kernels(wanted, onnxruntime_files(manifest)).library is not None:
        return contract.cache_bytes
    return contract.cache_values * KV_DTYPES["float32"]


def choose_kernels(wanted: str | None, files: OnnxRuntimeFiles) -> Kernels:
    """Native kernels where the engine has their graph and this machine a library that is faster than stock kernels.

    Args:
        wanted: "stock", "native" (or an error), or None for the best.

    Raises:
        EngineError: native kernels were asked for, or are all that the engine has, and cannot run; stock ones were
            asked for, and the engine has none; another name came.
    """
    if wanted not in (None, STOCK, NATIVE):
        raise EngineError(f"kernels is {wanted!r}; {STOCK!r} or {NATIVE!r} was expected")
    if wanted == STOCK:
        if files.native_alone:
            raise EngineError(f"kernels is {STOCK!r}, and the engine has native ones alone: {_BUILD_WHOLE}")
        return Kernels()
    try:
        if not files.native_graph:
            raise QuasarError("the engine has no native graph: an earlier version built it, or heads are above 256")
        library = find_library()
        asked = wanted == NATIVE or files.native_alone or os.environ.get("QUASAR_CPU_LEVEL")
        if is_slow(library) and not asked:
            raise QuasarError("this CPU has none of AVX2, AVX-VNNI, AVX512-VNNI and NEON dot products")
    except QuasarError as error:
        if wanted == NATIVE:
            raise EngineError(f"native kernels cannot run: {error}") from None
        if files.native_alone:
            raise EngineError(
                f"the engine has native kernels alone, and they cannot run: {error}; mend that, or {_BUILD_WHOLE}"
            ) from None
        return Kernels(reason=str(error))
    return Kernels(library=library.path, level=library.level)
