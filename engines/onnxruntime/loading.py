"""From an engine directory to a session on ONNX Runtime: its kernels, and what is known of this machine."""

import logging

from engines.directory import EngineDirectory
from engines.loaded import LoadedEngine
from engines.machine import Machine, user_cache
from engines.onnxruntime.draft_head import OnnxRuntimeDraftHead
from engines.onnxruntime.files import NAME, onnxruntime_files
from engines.onnxruntime.graphs import Graphs
from engines.onnxruntime.kernels import check_library, choose_kernels
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.onnxruntime.probing import mend, mends_quickly, probe_graphs, runs_stock_integers, this_machine
from engines.onnxruntime.threads import shared_threads
from engines.probes.driver import brief_plan
from engines.record import MachineRecord, keep_record, read_record
from quasar.errors import EngineError

_log = logging.getLogger("quasar.engines")


def load_onnxruntime(directory: EngineDirectory, options: OnnxRuntimeOptions) -> LoadedEngine:
    """A session on this machine's CPU, and what is known of its exactness and latencies.

    Raises:
        EngineError: ONNX Runtime is not installed, an option that cannot be honoured, or kernels that cannot run.
    """
    check_library()
    if options.provider != "cpu":
        raise EngineError(
            f"provider {options.provider!r} is not supported: this back end runs on the CPU; NVIDIA GPUs are served by "
            "the back ends cuda and tensorrt, since ONNX Runtime's CUDA provider does not run INT8 Q/DQ matmuls as such"
        )
    threads = _threads(options.threads)
    files = onnxruntime_files(directory.manifest)
    kernels = choose_kernels(options.kernels, files)
    if kernels.reason:
        _log.info("%s runs on stock kernels: %s", directory.path, kernels.reason)
    graphs = Graphs.of(directory.path, files, kernels)
    if options.drafts and not graphs.draft:
        raise EngineError(
            f"{directory.path} has no graph to draft with for itself, or not for {kernels.name} kernels: an engine has "
            "one, for native kernels, whose 4-bit weights are multiplied by floats, or whose cache is in tiers"
        )
    head = directory.manifest.draft_head if kernels.library is not None and options.draft_head else None
    if head is not None and options.hidden_states not in ((), head.feature_layers):
        # It cannot read what this session tells.
        head = None
    # Whoever drafts for a verifier that runs already does not measure beside it.
    record = _record(directory, this_machine(threads, kernels), threads, graphs, mends=not options.drafts)
    session = graphs.open(
        directory.manifest.contract,
        threads=threads,
        exact_integers=record.exact_integers,
        caches=options.caches,
        slots=options.slots,
        max_positions=options.max_positions,
        hidden_states=options.hidden_states or (() if head is None else head.feature_layers),
        drafts=options.drafts,
    )
    draft_head = None
    if head is not None and kernels.library is not None:
        draft_head = OnnxRuntimeDraftHead(
            directory.path,
            head,
            directory.manifest.contract,
            library=kernels.library,
            threads=threads,
            slots=session.num_slots,
        )
    return LoadedEngine(
        directory=directory,
        record=record,
        backend=NAME,
        session=session,
        kernels=kernels.name,
        kernels_reason=kernels.reason,
        draft_head=draft_head,
    )


def _threads(asked: int) -> int:
    """As many as were asked for, or as the process's shared pool has."""
    if asked < 0:
        raise EngineError(f"threads is {asked}; 0 (one per physical core) or more was expected")
    pool = shared_threads()
    if pool is None:
        return asked
    if asked not in (0, pool):
        raise EngineError(f"threads is {asked}, but this process shares a pool of {pool or 'default'} threads")
    return pool


def _record(
    directory: EngineDirectory, machine: Machine, threads: int, graphs: Graphs, *, mends: bool
) -> MachineRecord:
    """The build's record where it was this machine, else the user cache's, else a brief measurement.

    With `mends`, latencies that other work disturbed are measured again; the user cache keeps what is better.
    """
    built = directory.manifest.record
    known = built if built.machine == machine.to_json() else None
    if known is not None and not _needs_mending(known):
        return known
    path = user_cache() / "machines" / f"{directory.manifest.engine_hash[:16]}-{machine.key}.json"
    known = read_record(path) or known
    if known is not None and not (mends and _needs_mending(known)):
        return known
    contract = directory.manifest.contract
    if known is not None and not mends_quickly(known):
        _log.info(
            "%s has latencies of a busy machine (%s), and its passes are long: kept", directory.path, known.cost_noise
        )
        return known
    if known is not None:
        _log.info("%s has latencies of a busy machine (%s): measuring them again", directory.path, known.cost_noise)
        record = mend(known, graphs, contract, threads=threads)
    else:
        _log.info("%s was built on another machine: probing this one", directory.path)
        record = probe_graphs(
            graphs,
            contract,
            machine,
            brief_plan(contract, fixed_order=graphs.library is not None),
            has_integers=runs_stock_integers(graphs.graph),
            threads=threads,
        )
    keep_record(path, record)
    return record


def _needs_mending(record: MachineRecord) -> bool:
    return record.cost_noise is not None and record.cost_noise.deserves_another_look
