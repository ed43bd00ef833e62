"""The two libraries behind one adapter: `tensorrt` for the GPU at hand, `tensorrt-rtx` for any RTX GPU."""

import importlib
import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from quasar.errors import EngineError

LibraryName = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: tuple[LibraryName, ...] = ("tensorrt", "tensorrt-rtx")
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Tells Polygraphy which of the two it drives; it is read once, when Polygraphy is imported.
_POLYGRAPHY_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
# The first versions with IKVCacheUpdateLayer, which updates a cache in place.
_OLDEST = {"tensorrt": (10, 15), "tensorrt-rtx": (1, 3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An imported library; `module` is `tensorrt` or `tensorrt_rtx`, whose names are the same."""

    name: LibraryName
    module: Any
    version: str

    @property
    def cuda_major(self) -> int | None:
        """The CUDA version that the installed wheel is built for; None if that is not told."""
        stem = _MODULES[self.name]
        return next((major for major in (12, 13) if _is_installed(f"{stem}_cu{major}_libs")), None)

    @property
    def ahead_of_time(self) -> bool:
        """Whether it compiles for GPUs that are not in this machine."""
        return compiles_ahead(self.name)

    @property
    def compute_capabilities(self) -> list[str]:
        """What it compiles for ahead of time, for example "8.9"."""
        found = (
            re.findall(r"\bSM(\d+)(\d)\b", " ".join(dir(self.module.ComputeCapability))) if self.ahead_of_time else []
        )
        return sorted((f"{major}.{minor}" for major, minor in found), key=lambda text: tuple(map(int, text.split("."))))


def compiles_ahead(name: LibraryName) -> bool:
    """Whether a library compiles for GPUs that are not in this machine."""
    return name == "tensorrt-rtx"


def open_library(name: LibraryName) -> Library:
    """Import a library; raises `EngineError` if it is not installed, does not load, or is too old."""
    extra = f"pip install 'quasar-verifier[{name}]'"
    try:
        module = importlib.import_module(_MODULES[name])
        version = str(module.__version__)
        layers = module.LayerType
    except ModuleNotFoundError:
        raise EngineError(f"{name} is not installed: run {extra}") from None
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # The wheel named tensorrt fetches its libraries when it is installed; without them it imports badly or not.
        raise EngineError(f"{name} is installed but cannot be loaded ({error}): run {extra} again") from None
    if _numbers(version) < _OLDEST[name] or not hasattr(layers, "KV_CACHE_UPDATE"):
        oldest = ".".join(map(str, _OLDEST[name]))
        raise EngineError(f"{name} {version} is too old: {oldest} or newer updates a KV cache in place; run {extra} -U")
    return Library(name=name, module=module, version=version)


def check_capabilities(library: Library, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities to compile for; raises `EngineError` for one that the library does not know."""
    known = library.compute_capabilities
    if asked and not library.ahead_of_time:
        raise EngineError(f"{library.name} compiles for the GPU of this machine alone: leave --compute-capability out")
    for capability in asked:
        if capability not in known:
            raise EngineError(
                f"compute capability {capability} is unknown to {library.name} {library.version}; it compiles for "
                + ", ".join(known)
            )
    return tuple(dict.fromkeys(asked))


def check_driver(library: Library, driver: str) -> None:
    """Raise `EngineError` if the driver, whose CUDA version is given ("12.4"), is older than the library needs."""
    needed = library.cuda_major
    if needed is not None and _numbers(driver)[0] < needed:
        raise EngineError(
            f"the NVIDIA driver supports CUDA {driver}, and {library.name} {library.version} is built for CUDA "
            f"{needed}: update the driver"
        )


def import_polygraphy(name: LibraryName) -> None:
    """Import Polygraphy for one of the libraries.

    It can drive one of them in a process: raises `EngineError` if it drives the other already, or is not installed.
    """
    wanted = name == "tensorrt-rtx"
    if "polygraphy" not in sys.modules:
        os.environ[_POLYGRAPHY_SWITCH] = "1" if wanted else "0"
    try:
        import polygraphy  # noqa: F401 - for what it reads when it is imported
    except ImportError:
        raise EngineError(f"polygraphy is not installed: run pip install 'quasar-verifier[{name}]'") from None
    if polygraphy_drives_other(name):
        raise EngineError(
            f"Polygraphy drives the other TensorRT library in this process already: use {name} in one of its own, "
            f"or set {_POLYGRAPHY_SWITCH}={int(wanted)} before anything imports Polygraphy"
        )


def polygraphy_drives_other(name: LibraryName) -> bool:
    """Whether Polygraphy was imported in this process for the other library."""
    if "polygraphy" not in sys.modules:
        return False
    from polygraphy import config as settings

    return bool(settings.USE_TENSORRT_RTX) != (name == "tensorrt-rtx")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
