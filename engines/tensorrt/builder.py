"""Compiling a lowered graph to a plan, on Polygraphy's loaders."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.contract import Contract
from engines.machine import user_cache
from engines.tensorrt.library import Library, import_polygraphy
from engines.tensorrt.network import check_inputs, describe_bindings, describe_network, profiles_for
from quasar.errors import EngineError

_ERROR = 1
_logs: dict[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPlan:
    """A plan's bytes, and what the network was that it was compiled from (`engines.tensorrt.network`)."""

    data: bytes
    network: dict[str, Any]
    bindings: list[dict[str, Any]]


def compile_plan(
    library: Library,
    graph: Path,
    data_folder: Path,
    contract: Contract,
    *,
    compute_capability: str | None = None,
    plugins: tuple[Path, ...] = (),
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> CompiledPlan:
    """Compile a lowered graph, whose external data lies in `data_folder`, to a plan with both profiles.

    Args:
        compute_capability: for example "8.9", ahead of time; None takes this machine's GPU.
        plugins: shared libraries with TensorRT plugins; they are loaded, and kept inside the plan.
        on_progress: hears of every phase and step of the compiler; the steps of a phase are `total`.

    Raises:
        EngineError: the graph was refused, or nothing was compiled; the message has the library's own words.
    """
    loaders, create_config = _polygraphy(library)
    log = open_log(library)
    _load_plugins(library, plugins, log)
    builder = library.module.Builder(log)
    network = builder.create_network(_strongly_typed(library))
    parser = library.module.OnnxParser(network, log)
    # The graph's tensors are named relative to the engine directory, whichever folder the graph lies in.
    if not parser.parse(graph.read_bytes(), str(data_folder / graph.name)):
        raise EngineError(f"{library.name} {library.version} refused {graph}: {_first_error(parser)}")
    check_inputs(network)
    monitor = _monitor(library, on_progress)
    config = create_config(
        profiles=[_profile(shapes) for shapes in profiles_for(contract).values()],
        progress_monitor=monitor,
        profiling_verbosity=library.module.ProfilingVerbosity.DETAILED,
        **_capabilities(library, compute_capability),
        **_timing_cache(library),
    )
    described, bindings = describe_network(network), describe_bindings(network)

    def configured(builder: Any, network: Any) -> Any:
        made = config(builder, network)
        flags = library.module.BuilderFlag
        # Polygraphy leaves TF32 on for TensorRT-RTX; float32 means float32 here.
        made.clear_flag(flags.TF32)
        if hasattr(flags, "REQUIRE_USER_ALLOCATION"):
            # TensorRT-RTX: the plan allocates nothing when it runs, so that CUDA graphs can record it.
            made.set_flag(flags.REQUIRE_USER_ALLOCATION)
        if plugins:
            made.plugins_to_serialize = [str(path) for path in plugins]
        return made

    log.complaints.clear()
    try:
        timing = None if library.ahead_of_time else str(_timing_path(library))
        with _quiet():
            data = loaders.engine_bytes_from_network((builder, network, parser), configured, save_timing_cache=timing)
    except Exception as error:  # Polygraphy's and the library's errors share no public base
        if monitor.stopped is not None:
            raise monitor.stopped from None
        raise EngineError(f"{library.name} {library.version} compiled nothing: {log.worst or error}") from None
    return CompiledPlan(data=bytes(data), network=described, bindings=bindings)


def _polygraphy(library: Library) -> tuple[Any, Any]:
    """Polygraphy's loaders and its configuration for this library."""
    import_polygraphy(library.name)
    import polygraphy.backend.trt as loaders

    if library.ahead_of_time:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return loaders, CreateConfigRTX
    return loaders, loaders.CreateConfig


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy says on stderr what it does, and sets a timing cache that TensorRT-RTX deprecates."""
    from polygraphy.logger import G_LOGGER

    with warnings.catch_warnings(), G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _capabilities(library: Library, compute_capability: str | None) -> dict[str, Any]:
    if not library.ahead_of_time:
        return {}
    if compute_capability is None:
        return {"use_gpu": True}
    major, minor = compute_capability.split(".")
    return {"compute_capabilities": [(int(major), int(minor))]}


def _timing_path(library: Library) -> Path:
    return user_cache() / "timing" / f"{library.name}-{library.version}.cache"


def _timing_cache(library: Library) -> dict[str, Any]:
    """Tactics timed before; TensorRT-RTX times nothing ahead of time."""
    if library.ahead_of_time:
        return {}
    path = _timing_path(library)
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"load_timing_cache": str(path)} if path.is_file() else {}


def _profile(shapes: dict[str, Any]) -> Any:
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, (smallest, typical, largest) in shapes.items():
        profile.add(name, min=smallest, opt=typical, max=largest)
    return profile


def _strongly_typed(library: Library) -> int:
    """The flags of a strongly typed network, whose plugins bring compiled kernels; where a version has them."""
    known = library.module.NetworkDefinitionCreationFlag
    flags = [getattr(known, name, None) for name in ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")]
    return sum(1 << int(flag) for flag in flags if flag is not None)


def _load_plugins(library: Library, plugins: tuple[Path, ...], log: Any) -> None:
    if plugins and library.ahead_of_time:
        raise EngineError("TensorRT-RTX has no plugin layer: --plugin needs --backend tensorrt")
    if not plugins:
        return
    registry = library.module.get_plugin_registry()
    library.module.init_libnvinfer_plugins(log, "")
    for path in plugins:
        if not path.is_file() or registry.load_library(str(path)) is None:
            raise EngineError(f"{path} is no library of TensorRT plugins: {log.worst or 'it cannot be read'}")


def _first_error(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return "the parser gave no reason"
    # Without a driver, every complaint is followed by one about the driver, which nothing here needs.
    lines = [line for line in errors[0].desc().splitlines() if "Cuda Runtime" not in line]
    return f"node {errors[0].node_name()} ({errors[0].node_operator()}): {' '.join(lines)}"


def open_log(library: Library) -> Any:
    """The library's logger in this process: it keeps the last complaints instead of printing them.

    TensorRT takes one logger for everything, the first that it is given.
    """
    if library.name not in _logs:

        class Log(library.module.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()
                self.complaints: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= _ERROR:
                    self.complaints = [*self.complaints[-9:], message]

            @property
            def worst(self) -> str:
                return self.complaints[0] if self.complaints else ""

            @property
            def last(self) -> str:
                return self.complaints[-1] if self.complaints else ""

        _logs[library.name] = Log()
    return _logs[library.name]


def _monitor(library: Library, on_progress: Callable[[str, int, int], None]) -> Any:
    class Monitor(library.module.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:  # noqa: ARG002 - the interface
            self._steps[phase] = num_steps

        def step_complete(self, phase: str, step: int) -> bool:
            # TensorRT takes any exception for a wish to stop, and loses it: Ctrl-C, most of all.
            try:
                on_progress(phase, step + 1, self._steps.get(phase, 0))
            except BaseException as error:
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()
