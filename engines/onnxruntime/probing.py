"""Measuring an engine on ONNX Runtime: which integer kernels are exact, and what the probes find of its sessions."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from engines.latency import WARM_UP, Latency, better, measure_latency
from engines.machine import Machine, cpu_machine
from engines.onnxruntime.graphs import Graphs
from engines.onnxruntime.kernels import Kernels
from engines.onnxruntime.session_options import session_options
from engines.probes.driver import ProbePlan, run_probes
from engines.probes.integer_check import INPUT, OUTPUT, integers_are_exact
from engines.record import MachineRecord
from quasar.errors import EngineError
from quasar.files import sha256_file

# Sequences of the passes that are probed.
_PROBE_SLOTS = 4
# Limits of a second latency measurement at load, where somebody waits: rounds, seconds for each cached length, and
# seconds that the rounds may take by the latencies known until then.
_MEND_ROUNDS, _MEND_SECONDS, _MEND_LIMIT = 4, 1.5, 20.0


def this_machine(threads: int, kernels: Kernels) -> Machine:
    """The machine and ONNX Runtime of this process, running these kernels; another library of them is another one."""
    try:
        library = f"onnxruntime {version('onnxruntime')}"
    except PackageNotFoundError:
        import onnxruntime

        library = f"onnxruntime {onnxruntime.__version__}"
    if kernels.library is not None:
        library += f", operators {sha256_file(kernels.library)[:12]}"
    return cpu_machine(library=library, provider="CPUExecutionProvider", threads=threads, kernels=kernels.name)


def runs_stock_integers(graph: Path) -> bool:
    """Whether ONNX Runtime's own integer kernels run any linear of a lowered graph.

    They take quantized activations from QuantizeLinear, or MatMulNBits quantizes them itself. The names of a
    graph's operators stand in its file as they are.
    """
    content = graph.read_bytes()
    return any(operator in content for operator in (b"QuantizeLinear", b"MatMulNBits"))


def stock_integers_are_exact(graph: Path, *, threads: int = 0, exact_integers: bool = False) -> bool:
    """Whether the check graph's sums are exact here; `exact_integers`: with kernels that cannot saturate."""
    import onnxruntime as ort

    options = session_options(threads=threads, exact_integers=exact_integers)
    session = ort.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])

    def multiply(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run([OUTPUT], {INPUT: rows})[0])

    return integers_are_exact(multiply)


def needs_exact_integers(graphs: Graphs, *, threads: int) -> bool:
    """Whether integer kernels saturate here unless exact ones are asked for.

    Raises `EngineError` if even those are not exact: then no INT8 engine can be trusted on this CPU.
    """
    if stock_integers_are_exact(graphs.integer_check, threads=threads):
        return False
    if stock_integers_are_exact(graphs.integer_check, threads=threads, exact_integers=True):
        return True
    raise EngineError(
        "integer matmuls of extreme values are not exact on this CPU with this ONNX Runtime, with or without "
        "session.x64quantprecision: build with --precision fp32, or use another version of onnxruntime"
    )


def probe_graphs(
    graphs: Graphs,
    contract: Contract,
    machine: Machine,
    plan: ProbePlan,
    *,
    has_integers: bool,
    threads: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> MachineRecord:
    """Probe an engine on this machine; `on_step` is called for every cache length that is probed or timed.

    Args:
        has_integers: whether ONNX Runtime's own integer kernels run any linear (`runs_stock_integers`).
    """
    exact = has_integers and needs_exact_integers(graphs, threads=threads)
    cut_down = graphs.open_probe(contract, threads=threads, exact_integers=exact, slots=_PROBE_SLOTS)
    whole = graphs.open(contract, threads=threads, exact_integers=exact, slots=_PROBE_SLOTS)
    return run_probes(whole, machine, plan, cut_down=cut_down, exact_integers=exact, on_step=on_step)


def mends_quickly(record: MachineRecord) -> bool:
    """Whether `mend` takes seconds, not the minutes that the passes of an 8B model add up to.

    Of the known latencies, the time in which threads waited for a core is not the passes' own.
    """
    waited = 0.0 if record.cost_noise is None else record.cost_noise.waited or 0.0
    round_ms = (1 - waited) * sum(sum(by_width.values()) for by_width in record.cost_surface_ms.values())
    return (WARM_UP + _MEND_ROUNDS) * round_ms <= 1e3 * _MEND_LIMIT


def mend(record: MachineRecord, graphs: Graphs, contract: Contract, *, threads: int = 0) -> MachineRecord:
    """A record with the better of its own latencies and those that a brief look finds, in a session of its own."""
    session = graphs.open(contract, threads=threads, exact_integers=record.exact_integers, slots=_PROBE_SLOTS)
    try:
        found = measure_latency(session, least=_MEND_ROUNDS, seconds=_MEND_SECONDS)
    finally:
        session.close()
    if record.cost_noise is not None:
        found = better(Latency(surface_ms=record.cost_surface_ms, noise=record.cost_noise), found)
    return replace(record, cost_surface_ms=found.surface_ms, cost_noise=found.noise)
