"""From a path to a session that runs: check the directory, know the machine, load the graph."""

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from engines.cache_rows import HostCacheArrays
from engines.directory import EngineDirectory, open_directory
from engines.integer_check import runs_stock_integers
from engines.machine import Machine, this_machine, user_cache
from engines.manifest import MachineRecord
from engines.measuring import MeasuredFiles, measure_machine, mend
from engines.onnxruntime.kernels import Kernels, choose_kernels
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.onnxruntime.threads import shared_threads
from engines.session import Session
from engines.tensorrt.library import LIBRARIES, LibraryName
from engines.tensorrt.loading import find_placement, load_tensorrt
from quasar.errors import DamagedEngineError, EngineError
from quasar.files import write_json

_log = logging.getLogger("quasar.engines")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """An engine that is ready to run, with what was measured on this machine.

    `kernels`: ONNX Runtime's choice; None on other back ends.
    """

    directory: EngineDirectory
    record: MachineRecord
    backend: str
    session: Session
    kernels: Kernels | None = None


BACKENDS = ("onnxruntime", *LIBRARIES)


def load_engine(
    path: str | Path,
    *,
    backend: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    kernels: str | None = None,
    rebuild: bool = False,
) -> LoadedEngine:
    """Load an engine directory for this machine.

    Args:
        path: the engine directory; it is only read.
        backend: "onnxruntime", "tensorrt" or "tensorrt-rtx". None takes the first TensorRT library that is installed
            and has a plan for this machine's GPU in the directory, else ONNX Runtime.
        provider: ONNX Runtime's: "cpu". GPUs are TensorRT's.
        threads: 0 takes one per physical core.
        kernels: ONNX Runtime's: "native" (the operators of plugins/cpu, or an error), "stock" (its own), or None for
            native ones where they can run.
        rebuild: where no TensorRT plan fits this GPU and library, compile one into the user's cache.

    Raises:
        EngineError: no engine directory, damaged, newer, or this machine cannot run it on that back end.
    """
    if backend is not None and backend not in BACKENDS:
        raise EngineError(f"unknown backend {backend!r}; known are {', '.join(BACKENDS)}")
    directory = open_directory(Path(path))
    return load_opened(directory, backend=backend, provider=provider, threads=threads, kernels=kernels, rebuild=rebuild)


def load_opened(
    directory: EngineDirectory,
    *,
    backend: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    kernels: str | None = None,
    rebuild: bool = False,
    caches: HostCacheArrays | None = None,
) -> LoadedEngine:
    """As `load_engine`, from a directory that is open already.

    `caches`: another ONNX Runtime session's, to work on in place of its own.
    """
    for library in LIBRARIES:
        if backend == library or (backend is None and _has_plan(directory, library)):
            session, record = load_tensorrt(directory, library, rebuild=rebuild)
            return LoadedEngine(directory=directory, record=record, backend=library, session=session)
    return _load_onnxruntime(directory, provider=provider, threads=threads, wanted=kernels, caches=caches)


def _has_plan(directory: EngineDirectory, library: LibraryName) -> bool:
    """Whether the directory has a plan for this machine's GPU and the installed library."""
    if library not in directory.manifest.tensorrt:
        return False
    try:
        return find_placement(directory, library).plan is not None
    except EngineError:
        return False


def _load_onnxruntime(
    directory: EngineDirectory,
    *,
    provider: str,
    threads: int,
    wanted: str | None,
    caches: HostCacheArrays | None = None,
) -> LoadedEngine:
    _check_library()
    if provider != "cpu":
        raise EngineError(
            f"provider {provider!r} is not supported: this back end runs on the CPU; NVIDIA GPUs are served by the "
            "TensorRT back end, since ONNX Runtime's CUDA provider does not run INT8 Q/DQ matmuls as such"
        )
    if threads < 0:
        raise EngineError(f"threads is {threads}; 0 (one per physical core) or more was expected")
    pool = shared_threads()
    if pool is not None:
        if threads not in (0, pool):
            raise EngineError(f"threads is {threads}, but this process shares a pool of {pool or 'default'} threads")
        threads = pool
    kernels = choose_kernels(wanted, directory.manifest.onnxruntime)
    if kernels.reason:
        _log.info("%s runs on stock kernels: %s", directory.path, kernels.reason)
    files = MeasuredFiles.of(directory.path, directory.manifest.onnxruntime, kernels)
    record = _record(directory, this_machine(threads, kernels.name), threads, files)
    session = OnnxRuntimeSession(
        directory.path,
        files.graph,
        directory.manifest.contract,
        threads=threads,
        exact_integers=record.exact_integers,
        library=kernels.library,
        caches=caches,
    )
    return LoadedEngine(directory=directory, record=record, backend="onnxruntime", session=session, kernels=kernels)


def _check_library() -> None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise EngineError("ONNX Runtime is not installed: run pip install 'quasar-verifier[cpu]' (or [gpu])") from None


def _record(directory: EngineDirectory, machine: Machine, threads: int, files: MeasuredFiles) -> MachineRecord:
    """The build's record where it was this machine, else the user cache's, else a brief measurement.

    Prices that other work disturbed are measured again; the user cache keeps what is better.
    """
    built = directory.manifest.record
    known = built if built.machine == machine.to_json() else None
    if known is not None and not _is_noisy(known):
        return known
    path = user_cache() / "machines" / f"{directory.manifest.engine_hash[:16]}-{machine.key}.json"
    # A record that is not there, or cannot be read, is measured.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, DamagedEngineError):
        known = MachineRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    if known is not None and not _is_noisy(known):
        return known
    contract = directory.manifest.contract
    if known is not None:
        _log.info("%s has prices of a busy machine (%s): measuring them again", directory.path, known.cost_noise)
        record = mend(known, files, contract, threads=threads)
    else:
        _log.info("%s was built on another machine: probing this one", directory.path)
        record = measure_machine(
            files,
            contract,
            machine,
            has_integers=runs_stock_integers(files.graph),
            threads=threads,
            brief=True,
        )
    try:
        write_json(path, record.to_json())
    except OSError as error:
        _log.warning("the probe's result cannot be kept in %s (%s): the next load probes again", path, error)
    return record


def _is_noisy(record: MachineRecord) -> bool:
    return record.cost_noise is not None and record.cost_noise.noisy
