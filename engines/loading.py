"""From a path to a session that runs: check the directory, know the machine, load the graph."""

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from engines.directory import EngineDirectory, open_directory
from engines.machine import Machine, this_machine, user_cache
from engines.manifest import MachineRecord
from engines.measuring import MeasuredFiles, measure_machine
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.onnxruntime.threads import shared_threads
from quasar.errors import DamagedEngineError, EngineError
from quasar.files import write_json

_log = logging.getLogger("quasar.engines")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """An engine that is ready to run, with what was measured on this machine."""

    directory: EngineDirectory
    record: MachineRecord
    session: OnnxRuntimeSession


def load_engine(path: str | Path, *, provider: str = "cpu", threads: int = 0) -> LoadedEngine:
    """Load an engine directory for this machine.

    Args:
        path: the engine directory; it is only read.
        provider: "cpu". GPUs are TensorRT's.
        threads: 0 takes one per physical core.

    Raises:
        EngineError: no engine directory, damaged, newer, or ONNX Runtime cannot load it.
    """
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
    directory = open_directory(Path(path))
    machine = this_machine(threads)
    record = _record(directory, machine, threads)
    session = OnnxRuntimeSession(
        directory.path,
        directory.file(directory.manifest.onnxruntime.graph),
        directory.manifest.contract,
        threads=threads,
        exact_integers=record.exact_integers,
    )
    return LoadedEngine(directory=directory, record=record, session=session)


def measured_files(directory: EngineDirectory) -> MeasuredFiles:
    """The graphs of an engine directory."""
    files = directory.manifest.onnxruntime
    return MeasuredFiles(
        directory=directory.path,
        graph=directory.file(files.graph),
        probe=directory.file(files.probe),
        probe_layers=files.probe_layers,
        integer_check=directory.file(files.integer_check),
    )


def _check_library() -> None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise EngineError("ONNX Runtime is not installed: run pip install 'quasar-verifier[cpu]' (or [gpu])") from None


def _record(directory: EngineDirectory, machine: Machine, threads: int) -> MachineRecord:
    """The build's record where it was this machine, else the user cache's, else a brief measurement."""
    built = directory.manifest.record
    if built.machine == machine.to_json():
        return built
    path = user_cache() / "machines" / f"{directory.manifest.engine_hash[:16]}-{machine.key}.json"
    # A record that is not there, or cannot be read, is measured.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, DamagedEngineError):
        return MachineRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    _log.info("%s was built on another machine: probing this one", directory.path)
    record = measure_machine(
        measured_files(directory),
        directory.manifest.contract,
        machine,
        has_integers=directory.manifest.has_integers,
        threads=threads,
        brief=True,
    )
    try:
        write_json(path, record.to_json())
    except OSError as error:
        _log.warning("the probe's result cannot be kept in %s (%s): the next load probes again", path, error)
    return record
