"""Measuring one engine on one machine: integer exactness, row invariance, costs. At build in full, later briefly."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from engines import costs
from engines.contract import Contract
from engines.integer_check import integers_are_exact
from engines.machine import Machine
from engines.manifest import MachineRecord, OnnxRuntimeFiles
from engines.onnxruntime.kernels import Kernels
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.prefill_invariance import prefill_is_exact
from engines.row_invariance import BOUNDARY_STEP, boundary_lengths, brief_sweeps, full_sweeps, probe
from engines.tree_invariance import trees_are_exact
from quasar.errors import EngineError

# Rows of a prefill chunk that a brief measurement decodes on the whole graph.
_BRIEF_PREFILL_ROWS = 32
# How long prices may be sought for one number of rows in the cache: at a build, and where somebody waits.
_SECONDS, _BRIEF_SECONDS = 15.0, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredFiles:
    """Where the graphs of one engine lie; `directory` holds their external data, `library` the operators they need."""

    directory: Path
    graph: Path
    probe: Path
    probe_layers: int
    integer_check: Path
    library: Path | None = None

    @classmethod
    def of(cls, directory: Path, files: OnnxRuntimeFiles, kernels: Kernels) -> "MeasuredFiles":
        """The files of an engine directory that run with these kernels."""
        native = kernels.library is not None
        return cls(
            directory=directory,
            graph=directory / (files.native_graph if native else files.graph),
            probe=directory / (files.native_probe if native else files.probe),
            probe_layers=files.probe_layers,
            integer_check=directory / files.integer_check,
            library=kernels.library,
        )


def needs_exact_integers(files: MeasuredFiles, *, threads: int) -> bool:
    """Whether integer kernels saturate here unless exact ones are asked for.

    Raises `EngineError` if even those are not exact: then no INT8 engine can be trusted on this CPU.
    """
    if integers_are_exact(files.integer_check, threads=threads):
        return False
    if integers_are_exact(files.integer_check, threads=threads, exact_integers=True):
        return True
    raise EngineError(
        "integer matmuls of extreme values are not exact on this CPU with this ONNX Runtime, with or without "
        "session.x64quantprecision: build with --precision fp32, or use another version of onnxruntime"
    )


def measure_machine(
    files: MeasuredFiles,
    contract: Contract,
    machine: Machine,
    *,
    has_integers: bool,
    threads: int = 0,
    brief: bool = False,
    on_step: Callable[[str], None] = lambda what: None,
) -> MachineRecord:
    """Probe and time an engine on this machine; `on_step` hears of every cache length and row count.

    Args:
        has_integers: whether ONNX Runtime's own integer kernels run any linear (`integer_check.runs_stock_integers`).
    """
    exact = has_integers and needs_exact_integers(files, threads=threads)
    cut_down = OnnxRuntimeSession(
        files.directory,
        files.probe,
        contract,
        num_layers=files.probe_layers,
        threads=threads,
        exact_integers=exact,
        library=files.library,
    )
    whole = OnnxRuntimeSession(
        files.directory, files.graph, contract, threads=threads, exact_integers=exact, library=files.library
    )
    sweeps = brief_sweeps(contract) if brief else full_sweeps(contract)
    invariance = probe((cut_down, sweeps[0]), (whole, sweeps[1]), on_length=lambda: on_step("row invariance"))
    chain = invariance.chain or 1
    trees = trees_are_exact(cut_down, chain=chain) and trees_are_exact(whole, (64, 256), chain=chain)
    rows = _BRIEF_PREFILL_ROWS if brief else None
    prefill = prefill_is_exact(cut_down, invariance) and prefill_is_exact(whole, invariance, rows=rows)
    measured = measure_costs(whole, brief=brief, on_row=lambda: on_step("costs"))
    return MachineRecord(
        machine=machine.to_json(),
        row_invariance=replace(invariance, tree=trees, prefill=prefill),
        exact_integers=exact,
        cost_surface_ms=measured.surface_ms,
        cost_noise=measured.noise,
    )


def measure_costs(
    session: costs.TimedSession, *, brief: bool = False, on_row: Callable[[], None] = lambda: None
) -> costs.Costs:
    """The engine's cost surface; `brief`: at a load, where somebody waits. Overwrites the cache."""
    return costs.measure(
        session,
        rows=costs.surface_rows(session.contract),
        widths=costs.surface_widths(session.contract),
        least=4 if brief else 10,
        seconds=_BRIEF_SECONDS if brief else _SECONDS,
        on_row=on_row,
    )


def mend(record: MachineRecord, files: MeasuredFiles, contract: Contract, *, threads: int = 0) -> MachineRecord:
    """A record with the better of its own prices and those that a brief look finds, in a session of its own."""
    session = OnnxRuntimeSession(
        files.directory,
        files.graph,
        contract,
        threads=threads,
        exact_integers=record.exact_integers,
        library=files.library,
    )
    try:
        found = measure_costs(session, brief=True)
    finally:
        session.close()
    if record.cost_noise is not None:
        found = costs.better(costs.Costs(surface_ms=record.cost_surface_ms, noise=record.cost_noise), found)
    return replace(record, cost_surface_ms=found.surface_ms, cost_noise=found.noise)


def count_steps(contract: Contract, *, brief: bool = False) -> int:
    """How often `measure_machine` calls `on_step` when the first width holds."""
    sweeps = brief_sweeps(contract) if brief else full_sweeps(contract)
    lengths = sum(len(sweep.lengths) for part in sweeps for sweep in part)
    return lengths + len(boundary_lengths(contract)) // BOUNDARY_STEP + len(costs.surface_rows(contract))
