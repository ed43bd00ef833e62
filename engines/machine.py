"""Which machine this is, as far as kernels and timings depend on it, and where what is learned about it is kept."""

import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quasar.files import sha256_json

# Instruction sets that choose ONNX Runtime's kernels.
_FLAGS = ("avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What row invariance, integer exactness and costs may change with.

    `kernels`: "stock", or "native" and its instruction level. `threads` 0: ONNX Runtime's own choice.
    """

    system: str
    processor: str
    instruction_sets: tuple[str, ...]
    library: str
    provider: str
    threads: int
    cores: int
    kernels: str = "stock"

    @property
    def key(self) -> str:
        """A short name for this machine with this library."""
        return sha256_json(self.to_json())[:16]

    def to_json(self) -> dict[str, Any]:
        """The manifest's `machine`."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}


def this_machine(threads: int, kernels: str = "stock") -> Machine:
    """The machine and library of this process, running these kernels."""
    processor, flags = _processor()
    try:
        library = f"onnxruntime {version('onnxruntime')}"
    except PackageNotFoundError:
        import onnxruntime

        library = f"onnxruntime {onnxruntime.__version__}"
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=processor,
        instruction_sets=tuple(flag for flag in _FLAGS if flag in flags),
        library=library,
        provider="CPUExecutionProvider",
        threads=threads,
        cores=usable_cores(),
        kernels=kernels,
    )


def user_cache() -> Path:
    """The folder for what is learned about machines: `QUASAR_CACHE`, or the user's cache folder."""
    if named := os.environ.get("QUASAR_CACHE"):
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:
        # A service may run as a user without a home.
        home = Path(tempfile.gettempdir())
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "quasar-verifier"


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's name and flags; Linux tells both."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return name, flags
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            return name, frozenset(value.split())
    return name, flags
