"""From a path to a session that runs: check the directory, choose a back end, let it load."""

from pathlib import Path

from engines.backends import CPU, Backend, all_backends, find_backend
from engines.directory import EngineDirectory, open_directory
from engines.loaded import LoadedEngine
from quasar.errors import EngineError


def load_engine(path: str | Path, *, backend: str | None = None, options: object | None = None) -> LoadedEngine:
    """Load an engine directory for this machine.

    Args:
        path: the engine directory; it is only read.
        backend: a name in `engines.backends.BACKENDS`. None takes the first that runs on a GPU and can run this engine
            here, else ONNX Runtime.
        options: the back end's load options, for example `OnnxRuntimeOptions`; None for their defaults. Without a
            `backend`, only back ends that take such options are considered.

    Raises:
        EngineError: no engine directory, damaged, newer, or this machine cannot run it on that back end; options of
            another back end.
    """
    if backend is not None:
        find_backend(backend)
    return load_opened(open_directory(Path(path)), backend=backend, options=options)


def load_opened(
    directory: EngineDirectory, *, backend: str | None = None, options: object | None = None
) -> LoadedEngine:
    """As `load_engine`, from a directory that is open already."""
    chosen = choose_backend(directory, options) if backend is None else find_backend(backend)
    if options is None:
        options = chosen.options()
    if not isinstance(options, chosen.options):
        raise EngineError(
            f"backend {chosen.name!r} takes {chosen.options.__name__}; {type(options).__name__} came as options"
        )
    return chosen.load(directory, options)


def choose_backend(directory: EngineDirectory, options: object | None = None) -> Backend:
    """The back end for an engine where nobody chose one: on a GPU if one can run it, else on the CPU.

    Where none can run it, the one for the CPU, whose `load` says why.
    """
    present = [
        backend
        for name, backend in all_backends().items()
        if name in directory.manifest.backends and (options is None or isinstance(options, backend.options))
    ]
    if not present:
        raise EngineError(f"{directory.path} has no back end that takes {type(options).__name__}")
    present.sort(key=lambda backend: backend.device == CPU)
    able = (backend for backend in present if not backend.refusal(directory))
    return next(able, next((backend for backend in present if backend.device == CPU), present[0]))
