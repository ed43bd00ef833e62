"""What a back end is, and which there are. Adding one is a folder and a line in `BACKENDS` (docs/adding-a-backend.md).

The registry imports a back end when it is first asked for it, and its module imports nothing heavy.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from engines.contract import Contract
from quasar.errors import EngineError

if TYPE_CHECKING:
    from engines.directory import EngineDirectory
    from engines.loaded import LoadedEngine

CPU, GPU = "cpu", "gpu"


class Section(Protocol):
    """A back end's part of the manifest, `backends.<name>`."""

    @property
    def names(self) -> Sequence[str]:
        """Every file that it names, as paths in the engine directory."""

    def check(self, contract: Contract) -> None:
        """Raise `DamagedEngineError` if it does not fit the engine's sizes."""

    def to_json(self) -> dict[str, Any]:
        """The part as it stands in the file."""


@dataclass(frozen=True, slots=True)
class UnknownSection:
    """The part of a back end that this installation does not know: written back as it is, and never run."""

    value: Any

    @property
    def names(self) -> Sequence[str]:
        """Which of its fields are files is not known."""
        return ()

    def check(self, contract: Contract) -> None:
        """Nothing is known that could be checked."""

    def to_json(self) -> dict[str, Any]:
        """What was read."""
        part: dict[str, Any] = self.value
        return part


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """The load options of a back end that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that `inspect` shows; columns without a name have no heading."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend(ABC):
    """What runs an engine.

    Attributes:
        name: in the manifest, in `--backend`, and in the registry.
        folder: where its files lie in an engine directory.
        device: `CPU` or `GPU`. Without a choice, an engine is loaded on a GPU where one can run it.
        packages: what must be importable, by import name.
        in_every_build: whether every engine has it, so that it is part of what `engine_hash` names. Other back ends are
            added to a directory that is built already, and can be made again from its portable graph.
        options: the type of its load options, a dataclass whose fields have defaults.
        compiler: the module that adds it to an engine directory, with the functions of `export.compile.Compiler`; ""
            where there is nothing to compile. A path, since what changes graphs is a floor above.
        ahead_of_time: whether it compiles for devices that are not in this machine.
    """

    name: str
    folder: str
    device: str = CPU
    packages: tuple[str, ...] = ()
    in_every_build: bool = False
    options: type = NoOptions
    compiler: str = ""
    ahead_of_time: bool = False

    @abstractmethod
    def read_section(self, value: Mapping[str, Any]) -> Section:
        """Its part of a manifest, checked; raises `DamagedEngineError` naming what does not fit."""

    @abstractmethod
    def load(self, directory: "EngineDirectory", options: Any) -> "LoadedEngine":
        """A session over its files of the directory, and what was measured of it on this machine.

        Raises `EngineError` for whatever `refusal` names, and for files that cannot be loaded.
        """

    def refusal(self, directory: "EngineDirectory") -> str:
        """Why it cannot run this engine on this machine; "" where it can."""
        if self.name not in directory.manifest.backends:
            return f"{directory.path} has no {self.name} back end"
        missing = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(missing)}: not installed" if missing else ""

    def to_json(self, directory: "EngineDirectory") -> dict[str, Any]:
        """What `inspect --backend NAME --json` prints."""
        return directory.manifest.backends[self.name].to_json()

    def show(self, directory: "EngineDirectory") -> Iterator[str | Table]:
        """The same for people: lines and tables."""
        for name, item in self.to_json(directory).items():
            yield f"{name}: {item}"

    def make_options(self, keywords: Mapping[str, Any]) -> Any:
        """Its load options from keywords, of which it takes those that are its own."""
        names = {field.name for field in fields(self.options)}
        return self.options(**{name: value for name, value in keywords.items() if name in names})


# Name → the object in the back end's `backend.py`.
BACKENDS: dict[str, str | Backend] = {
    "onnxruntime": "engines.onnxruntime.backend:ONNXRUNTIME",
    "cuda": "engines.cuda.backend:CUDA",
    "tensorrt": "engines.tensorrt.backend:TENSORRT",
    "tensorrt-rtx": "engines.tensorrt.backend:TENSORRT_RTX",
}


def find_backend(name: str) -> Backend:
    """A back end by its name; raises `EngineError` for one that is not registered."""
    known = BACKENDS.get(name)
    if known is None:
        raise EngineError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    if isinstance(known, Backend):
        return known
    module, _, attribute = known.partition(":")
    backend: Backend = getattr(import_module(module), attribute)
    return backend


def all_backends() -> dict[str, Backend]:
    """Every registered back end by its name, in the registry's order."""
    return {name: find_backend(name) for name in BACKENDS}
