"""What is known of an engine on this machine's GPU: the user cache's record, else a measurement."""

import logging

from engines.directory import EngineDirectory
from engines.gpu.device import Gpu
from engines.machine import Machine, user_cache
from engines.probes.driver import ProbePlan, run_probes
from engines.record import MachineRecord, keep_record, read_record
from engines.session import Session

_log = logging.getLogger("quasar.engines")


def gpu_machine(gpu: Gpu, library: str) -> Machine:
    """The GPU and what computes on it, as what row invariance and latencies depend on."""
    return Machine(
        system=f"CUDA {gpu.driver}",
        processor=gpu.name,
        instruction_sets=(f"sm{gpu.compute_capability.replace('.', '')}",),
        library=library,
        provider="cuda",
        threads=0,
        cores=0,
        kernels="",
    )


def gpu_record(
    directory: EngineDirectory, compiled: str, machine: Machine, session: Session, plan: ProbePlan
) -> MachineRecord:
    """The record of a loaded engine; measured and kept where there is none.

    `compiled`: tells what was compiled from the engine's graph from other such, where the engine's hash does not.
    """
    path = user_cache() / "machines" / f"{directory.manifest.engine_hash[:16]}-{compiled}-{machine.key}.json"
    record = read_record(path)
    if record is None:
        _log.info("%s was never measured on this GPU: probing it", directory.path)
        record = run_probes(session, machine, plan)
        keep_record(path, record)
    return record
