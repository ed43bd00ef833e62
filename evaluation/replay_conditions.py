"""The engine and machine that a replay stands for."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engines.contract import MAX_WIDTH
from engines.directory import open_directory
from engines.latency import LatencySurface
from engines.loaded import LoadedEngine
from engines.probes.row_invariance import RowInvariance
from engines.session import Positions
from evaluation.replay_clock import ReplayClock
from evaluation.replay_head import ReplayedHead
from quasar.errors import GenerationError, PromptError
from runtime.control.latency import LatencyModel
from runtime.drafters.draft_engine import DraftEngines
from runtime.drafters.named import VerifierProfile

_COSTS = 'cached length → width → milliseconds was expected, as in {"256": {"1": 9.0, "4": 10.3, "8": 15.5}}'


class ClockedSession:
    """A session whose passes take, by a clock, the latencies of a surface."""

    def __init__(self, session: Any, surface_ms: LatencySurface, clock: ReplayClock) -> None:
        self._session, self._clock = session, clock
        # Chunks of a prompt are wider than any verify pass: there the surface is extended as a straight line.
        self._latency = LatencyModel(surface_ms, widest=max(MAX_WIDTH, session.contract.prefill_chunk))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the session's own."""
        return getattr(self._session, name)

    def run_batch(self, batch: Sequence[Positions], *, logits: Any = None) -> Any:
        """As the session's own."""
        seconds = sum(self._latency.of(one.cache_length).seconds[len(one.tokens) - 1] for one in batch)
        with self._clock.charging(seconds):
            return self._session.run_batch(batch, logits=logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConditions:
    """The engine and machine that a replay stands for: how long passes take, which are exact, what drafters find."""

    surface_ms: LatencySurface
    exact: RowInvariance
    target: VerifierProfile
    clock: ReplayClock = field(default_factory=ReplayClock)
    head: ReplayedHead | None = None

    @classmethod
    def read(
        cls,
        engine: Path | None,
        costs: Path | None,
        vocab_size: int,
        *,
        draft_costs: Path | None = None,
        with_head: bool = False,
        head_step_ms: float | None = None,
    ) -> "ReplayConditions":
        """From an engine directory, a file of costs, or both.

        Args:
            engine: latencies, exact passes, successors and vocabulary of this one.
            costs: file with latencies of the verifier's passes, in place of the engine's.
            vocab_size: of the trace.
            draft_costs: the same for passes of engines that draft, in place of their own.
            with_head: the engine's draft head drafts as well.
            head_step_ms: what a step of it takes, in place of what it takes here.

        Raises:
            QuasarError: neither engine nor costs, or a file that cannot be read.
        """
        clock = ReplayClock()
        engines: DraftEngines | None = None
        if engine is None and costs is None:
            raise GenerationError("how long passes take is not known: give --engine DIR or --costs FILE")
        exact = RowInvariance(chain=1, widest=MAX_WIDTH, tree=True)
        warm: Mapping[int, Sequence[int]] = {}
        surface: LatencySurface = {}
        if engine is not None:
            directory = open_directory(engine)
            manifest = directory.manifest
            if manifest.contract.vocab_size != vocab_size:
                raise GenerationError(
                    f"{engine} has {manifest.contract.vocab_size} tokens, the trace's engine had {vocab_size}"
                )
            exact, surface = manifest.record.row_invariance, manifest.record.cost_surface_ms
            warm = directory.successors()
            engines = DraftEngines(
                directory,
                adapt=_at_costs(clock, None if draft_costs is None else _read_costs(draft_costs)),
                no_cache="a replay has none of the verifier's",
                clock=clock,
            )
        elif draft_costs is not None:
            raise GenerationError("engines that draft are compared with the verifier's: give --engine DIR, too")
        if costs is not None:
            surface = _read_costs(costs)
        head = None
        if with_head:
            if engine is None:
                raise GenerationError("a draft head reads the verifier's hidden states: give --engine DIR, too")
            head = ReplayedHead(engine, LatencyModel(surface, widest=MAX_WIDTH), clock, head_step_ms)
        return cls(
            surface_ms=surface,
            exact=exact,
            target=VerifierProfile(
                vocab_size=vocab_size,
                trees=exact.tree,
                tells_successors=True,
                warm=warm,
                engines=engines,
                draft_head=None if head is None else head.cache,
            ),
            clock=clock,
            head=head,
        )


def _at_costs(clock: ReplayClock, surface_ms: LatencySurface | None) -> Callable[[LoadedEngine], LoadedEngine]:
    """Makes an engine's passes take what a surface says by the clock; None: what its own says."""

    def adapt(loaded: LoadedEngine) -> LoadedEngine:
        record = loaded.record if surface_ms is None else replace(loaded.record, cost_surface_ms=surface_ms)
        session: Any = ClockedSession(loaded.session, record.cost_surface_ms, clock)
        return replace(loaded, record=record, session=session)

    return adapt


def _read_costs(path: Path) -> LatencySurface:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        surface = {int(length): {int(width): float(ms) for width, ms in row.items()} for length, row in value.items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise PromptError(f"{path} cannot be read as costs ({error}); {_COSTS}") from None
    filled = bool(surface) and all(length >= 0 and row for length, row in surface.items())
    if not filled or any(width < 1 or not 0 < ms < math.inf for row in surface.values() for width, ms in row.items()):
        raise PromptError(f"{path}: cached lengths, widths and milliseconds above 0 were expected; {_COSTS}")
    return surface
