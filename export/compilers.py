"""Which module adds a back end to an engine directory (`engines.backends.Backend.compiler`), and to which not."""

from collections import Counter
from importlib import import_module
from typing import Protocol, cast

from calibration.precisions.base import Refused
from calibration.precisions.catalog import choices_on, precision_of
from engines.backends import all_backends, find_backend
from engines.directory import EngineDirectory
from engines.manifest import Manifest
from engines.onnxruntime.files import onnxruntime_files
from export.build_options import CompileOptions, Reporter
from quasar.errors import BuildError


class Compiler(Protocol):
    """The functions of such a module (`export.compile` is TensorRT's)."""

    def check_target(self, backend: str, compute_capabilities: tuple[str, ...]) -> None:
        """Raise `EngineError` naming what is missing on this machine: a build takes minutes, and this no time."""

    def needs_own_process(self, backend: str) -> bool:
        """Whether what this process has imported already stands in the way."""

    def compile_engine(self, options: CompileOptions, reporter: Reporter | None = None) -> EngineDirectory:
        """Write the back end's files into the directory, and its manifest last; returns it, opened again."""


def compiler_of(backend: str) -> Compiler:
    """The module; raises `BuildError` for a back end that has none."""
    path = find_backend(backend).compiler
    if not path:
        raise BuildError(f"{backend} has nothing to compile: every build makes it")
    return cast("Compiler", import_module(path))


def compiled_backends() -> list[str]:
    """The back ends that are added to a directory after its build."""
    return [name for name, backend in all_backends().items() if backend.compiler]


def ahead_of_time_backends() -> list[str]:
    """Those that compile for devices that are not in this machine."""
    return [name for name, backend in all_backends().items() if backend.ahead_of_time]


def check_whole(directory: EngineDirectory, backend: str) -> None:
    """Raise `BuildError` for an engine that was built with `--kernels native`: nothing else can be made from it."""
    if onnxruntime_files(directory.manifest).native_alone:
        raise BuildError(
            f"{directory.path} was built with --kernels native, and {backend} is compiled from the portable graph, "
            "which it has not: build it again without --kernels native"
        )


def check_precisions(manifest: Manifest, backend: str) -> None:
    """Raise `BuildError` if a precision of the engine's linears has no form on a back end (calibration.precisions)."""
    for name, count in Counter(manifest.linears.values()).items():
        precision = precision_of(name)
        if isinstance(lowering := precision.lowering(backend), Refused):
            raise BuildError(
                f"{count} of the engine's {len(manifest.linears)} linears are {precision.title}, and "
                f"{lowering.reason}: compile an engine built with --precision {choices_on(backend)}"
            )
