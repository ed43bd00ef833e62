"""The verifier: the one place that runs passes of an engine, for verification, prompts and engines that draft."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from engines.session import Positions, Session
from runtime.segment import Segment, Targets

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Verifier:
    """A session, and the buffer that logits are computed into. Used by one thread at a time (runtime.scheduler)."""

    def __init__(self, session: Session, *, most_logits: int | None = None) -> None:
        """`most_logits`: positions of a pass whose logits are wanted at most; None: as many as a pass holds."""
        self.session = session
        self._most_logits = session.contract.max_width if most_logits is None else most_logits
        self._logits: Float32 | None = None

    @property
    def contract(self) -> Contract:
        """Sizes."""
        return self.session.contract

    @property
    def logits_bytes(self) -> int:
        """Memory of the buffer for logits."""
        return 0 if self._logits is None else self._logits.nbytes

    def run(self, segments: Sequence[Segment]) -> list[Targets]:
        """Make one pass; what the target says of each segment, in their order.

        Logits are computed for all of them where one wants them.
        """
        batch = [
            Positions(
                tokens=one.tokens,
                cache_length=one.cache_length,
                num_logits=one.num_logits,
                slot=one.slot,
                parents=one.parents,
            )
            for one in segments
        ]
        total = sum(one.num_logits for one in segments)
        logits = self._buffer(total) if any(one.wants_logits for one in segments) else None
        tokens = self.session.run_batch(batch, logits=logits)
        successors = self.session.top_tokens
        hidden = self.session.hidden_states
        targets = []
        first = fed = 0
        for one in segments:
            end, before, fed = first + one.num_logits, fed, fed + len(one.tokens)
            targets.append(
                Targets(
                    next_tokens=None if one.wants_logits else tokens[first:end],
                    logits=logits[first:end] if logits is not None and one.wants_logits else None,
                    successors=None if successors is None else successors[first:end],
                    hidden_states=None if hidden is None else tuple(states[before:fed] for states in hidden),
                )
            )
            first = end
        return targets

    def prefill(
        self,
        tokens: Int64,
        *,
        first: int = 0,
        slot: int = 0,
        wants_logits: bool = False,
        on_chunk: Callable[[Int64], None] = lambda chunk: None,
    ) -> Targets:
        """Feed `tokens` int64 [n] from position `first` of a slot on, chunk by chunk; the targets after the last one.

        `on_chunk` is told the tokens of every chunk that was fed.
        """
        targets = Targets()
        for chunk in self.contract.prompt_chunks(len(tokens), first):
            segment = Segment(
                tokens=tokens[chunk], cache_length=chunk.start, num_logits=1, wants_logits=wants_logits, slot=slot
            )
            [targets] = self.run([segment])
            on_chunk(segment.tokens)
        return targets

    def keep_path(self, segment: Segment, path: Sequence[int]) -> None:
        """Move the cache positions of an accepted path to the front of the segment's; a chain's are there already."""
        if segment.parents is not None:
            self.session.compact(segment.cache_length, np.array(path, np.int64), slot=segment.slot)

    def _buffer(self, count: int) -> Float32:
        """Float32 [count or more, V]; large enough from the start, so that no round of one sequence allocates."""
        if self._logits is None or len(self._logits) < count:
            self._logits = np.empty((max(count, self._most_logits), self.contract.vocab_size), np.float32)
        return self._logits
