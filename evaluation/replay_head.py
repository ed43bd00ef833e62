"""A draft head in a replay: the verifier tells its hidden states of recorded tokens, and steps take what is said."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.draft_head import DraftHeadSession, HeadTargets
from engines.loading import load_engine
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.session import Positions, Session
from evaluation.replay_clock import ReplayClock
from quasar.errors import GenerationError
from runtime.control.latency import LatencyModel
from runtime.drafters.draft_head import DraftHeadCache
from runtime.traces import TracedGeneration

Float32 = NDArray[np.float32]

# Steps that are timed here where nobody says what one takes.
_TIMED, _WARM = 30, 5


class ReplayedHead:
    """An engine's verifier and draft head.

    Hidden states are those of the whole sequence at once: the same bits as in rounds, on kernels where a position's
    bits do not depend on what is fed with it.
    """

    def __init__(self, engine: Path, latency: LatencyModel, clock: ReplayClock, step_ms: float | None = None) -> None:
        """Load both.

        Args:
            latency: of the verifier's passes: a step of more positions takes as much more as those do.
            clock: what steps are charged to.
            step_ms: what a step of one position takes; None: as it is here.

        Raises:
            GenerationError: the engine has no draft head that runs here.
        """
        loaded = load_engine(engine, options=OnnxRuntimeOptions())
        if loaded.draft_head is None:
            raise GenerationError(
                f"{engine} has no draft head that runs here: python -m export add-head DIR HEAD adds one, for native "
                "kernels"
            )
        self._session: Session = loaded.session
        seconds = _step_seconds(loaded.draft_head) if step_ms is None else step_ms / 1e3
        self.cache = DraftHeadCache(_TimedHead(loaded.draft_head, seconds, latency, clock), clock=clock)

    def hidden_states(self, generation: TracedGeneration) -> tuple[Float32, ...]:
        """The verifier's, at every position but the last: float32 [n, hidden] by layer."""
        tokens = np.array(generation.prompt + generation.tokens, np.int64)[:-1]
        parts: list[tuple[Float32, ...]] = []
        for chunk in self._session.contract.prompt_chunks(len(tokens)):
            self._session.run(tokens[chunk], chunk.start, 1)
            states = self._session.hidden_states
            assert states is not None
            parts.append(tuple(one.copy() for one in states))
        return tuple(np.concatenate(layer) for layer in zip(*parts, strict=True))


class _TimedHead:
    """A head whose steps take, by a clock, what is said."""

    def __init__(self, head: DraftHeadSession, seconds: float, latency: LatencyModel, clock: ReplayClock) -> None:
        self._head, self._seconds, self._clock = head, seconds, clock
        passes = latency.of(0).seconds
        self._shape = [one / passes[0] for one in passes]

    def __getattr__(self, name: str) -> Any:
        """Everything else is the head's own."""
        return getattr(self._head, name)

    def run(self, batch: Sequence[Positions], hidden_states: Float32) -> HeadTargets:
        """As the head's own."""
        width = min(len(hidden_states), len(self._shape))
        with self._clock.charging(self._seconds * self._shape[width - 1]):
            return self._head.run(batch, hidden_states)


def _step_seconds(head: DraftHeadSession) -> float:
    states = np.ones((1, head.hidden_size), np.float32)
    took = []
    for _ in range(_WARM + _TIMED):
        start = time.perf_counter()
        head.run([Positions(tokens=np.zeros(1, np.int64), cache_length=0, num_logits=1)], states)
        took.append(time.perf_counter() - start)
    return median(took[_WARM:])
