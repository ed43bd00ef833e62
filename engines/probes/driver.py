"""All probes of a session, one after the other, and the record that they make: the same for every back end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engines.contract import Contract, has_boundaries
from engines.latency import measure_latency, surface_lengths
from engines.machine import Machine
from engines.probes.batch_invariance import batches_are_exact
from engines.probes.prefill_invariance import prefill_is_exact
from engines.probes.row_invariance import (
    BOUNDARY_STEP,
    BRIEF_WIDTHS,
    WIDTHS,
    Sweep,
    boundary_lengths,
    brief_sweeps,
    find_row_invariance,
    full_sweeps,
    sampled_boundary_lengths,
)
from engines.probes.tree_invariance import trees_are_exact
from engines.record import MachineRecord
from engines.session import Session

# Positions of a prefill chunk that a brief plan decodes on the whole graph.
_BRIEF_PREFILL_POSITIONS = 32
# Lengths up to here are all looked at where kernels do not say their order: half a minute of a small model.
_ALL_UNTIL = 4096
# Cache lengths at which trees are compared on the whole graph, where a cut-down one has seen the others.
_WHOLE_TREE_LENGTHS = (64, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """How thoroughly a session is probed.

    Attributes:
        cut_down, whole: the sweeps of the row invariance probe on the cut-down graph and on the whole one.
        boundaries: cache lengths at which a change of the order of summation is looked for.
        prefill_positions: positions of a prefill chunk that are decoded on the whole graph; None for all.
        least_rounds, seconds: of the latency measurement, at each cached length.
    """

    cut_down: tuple[Sweep, ...]
    whole: tuple[Sweep, ...]
    boundaries: Sequence[int]
    prefill_positions: int | None = None
    least_rounds: int = 10
    seconds: float = 15.0

    def count_steps(self, contract: Contract) -> int:
        """How often `run_probes` calls `on_step` when the first width holds."""
        lengths = sum(len(sweep.lengths) for sweep in (*self.cut_down, *self.whole))
        boundaries = sum(length % BOUNDARY_STEP == 0 for length in self.boundaries)
        return lengths + boundaries + len(surface_lengths(contract))


def sampled_plan(contract: Contract, *, fixed_order: bool = False) -> ProbePlan:
    """A build's: samples on the whole graph, whose passes are what takes long; the cut-down one is looked at closely.

    `fixed_order`: the kernels' order of summation is written down, so that samples serve there, too: passes for every
    length take minutes even of two layers, where these are large.
    """
    cut_down, _ = brief_sweeps(contract) if fixed_order else full_sweeps(contract)
    _, whole = brief_sweeps(contract)
    last = contract.max_length - max(WIDTHS)
    return ProbePlan(
        cut_down=tuple(cut_down),
        whole=(*whole, Sweep(first=last, last=last, widths=BRIEF_WIDTHS)) if last > 0 else tuple(whole),
        boundaries=_boundaries(contract, fixed_order),
        prefill_positions=_BRIEF_PREFILL_POSITIONS,
        least_rounds=4,
        seconds=4.0,
    )


def full_plan(contract: Contract) -> ProbePlan:
    """A thorough build's: minutes, with a large model many."""
    cut_down, whole = full_sweeps(contract)
    return ProbePlan(cut_down=tuple(cut_down), whole=tuple(whole), boundaries=boundary_lengths(contract))


def brief_plan(contract: Contract, *, fixed_order: bool = False) -> ProbePlan:
    """A first load's on another machine, where somebody waits: a few seconds. `fixed_order`: as in `sampled_plan`."""
    cut_down, whole = brief_sweeps(contract)
    return ProbePlan(
        cut_down=tuple(cut_down),
        whole=tuple(whole),
        boundaries=_boundaries(contract, fixed_order),
        prefill_positions=_BRIEF_PREFILL_POSITIONS,
        least_rounds=4,
        seconds=1.5,
    )


def _boundaries(contract: Contract, fixed_order: bool) -> Sequence[int]:
    """All lengths where boundaries are known to be; elsewhere a sample, closer where the order is not written down.

    Two passes for every length take time that grows with the square of the context: minutes at 32,768.
    """
    if fixed_order:
        return sampled_boundary_lengths(contract)
    if has_boundaries(contract.head_size):
        return boundary_lengths(contract)
    return sampled_boundary_lengths(contract, all_until=_ALL_UNTIL)


def run_probes(
    session: Session,
    machine: Machine,
    plan: ProbePlan,
    *,
    cut_down: Session | None = None,
    exact_integers: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> MachineRecord:
    """Probe a session and time its passes; overwrites its cache.

    Args:
        cut_down: a session over the graph's first layers, on which most is compared; None where there is none.
        exact_integers: whether the session was made with integer kernels that cannot saturate.
        on_step: called for every cache length that is probed or timed.
    """
    small = session if cut_down is None else cut_down
    invariance = find_row_invariance(
        (small, plan.cut_down), (session, plan.whole), on_length=on_step, boundary_at=plan.boundaries
    )
    chain = invariance.chain or 1
    trees = trees_are_exact(small, chain=chain)
    if cut_down is not None:
        trees = trees and trees_are_exact(session, _WHOLE_TREE_LENGTHS, chain=chain)
        prefill = prefill_is_exact(cut_down, invariance)
        prefill = prefill and prefill_is_exact(session, invariance, positions=plan.prefill_positions)
    else:
        prefill = prefill_is_exact(session, invariance, positions=plan.prefill_positions)
    shares = prefill and chain == 1 and (cut_down is None or batches_are_exact(cut_down, trees=trees))
    # One look at the whole graph, where the cut-down one has passed.
    shares = shares and batches_are_exact(session, trees=trees, **({} if cut_down is None else {"batches": 1}))
    latency = measure_latency(session, least=plan.least_rounds, seconds=plan.seconds, on_length=on_step)
    return MachineRecord(
        machine=machine.to_json(),
        row_invariance=replace(invariance, tree=trees, prefill=prefill, batch=shares),
        exact_integers=exact_integers,
        cost_surface_ms=latency.surface_ms,
        cost_noise=latency.noise,
    )
