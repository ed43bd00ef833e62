"""The verifier: the one place that runs passes of an engine, for verification, prompts and engines that draft."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from engines.session import Session
from runtime.segment import Segment, Targets

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Verifier:
    """A session, and the buffer that logits are computed into. Used by one thread at a time (runtime.scheduler)."""

    def __init__(self, session: Session, *, most_logits: int | None = None) -> None:
        """`most_logits`: positions of a pass whose logits are wanted at most; None: as many as a pass holds."""
        self._session = session
        self._most_logits = session.contract.max_width if most_logits is None else most_logits
        self._logits: Float32 | None = None

    @property
    def contract(self) -> Contract:
        """Sizes."""
        return self._session.contract

    @property
    def logits_bytes(self) -> int:
        """Memory of the buffer for logits."""
        return 0 if self._logits is None else self._logits.nbytes

    def run(self, segments: Sequence[Segment]) -> list[Targets]:
        """Make one pass; what the target says of each segment, in their order.

        Raises:
            ValueError: not one segment: an engine's pass holds one sequence.
        """
        if len(segments) != 1:
            raise ValueError(f"a pass of {len(segments)} sequences came; this engine takes one sequence per pass")
        (segment,) = segments
        fed = (segment.tokens, segment.cache_length, segment.num_logits, segment.parents)
        if segment.wants_logits:
            logits = self._session.run_logits(*fed, out=self._buffer(segment.num_logits))
            return [Targets(logits=logits, successors=self._session.top_tokens)]
        return [Targets(next_tokens=self._session.run(*fed), successors=self._session.top_tokens)]

    def prefill(
        self,
        tokens: Int64,
        *,
        first: int = 0,
        wants_logits: bool = False,
        on_chunk: Callable[[Int64], None] = lambda chunk: None,
    ) -> Targets:
        """Feed `tokens` int64 [n] from position `first` on, chunk by chunk; the targets after the last one.

        `on_chunk` is told the tokens of every chunk that was fed.
        """
        targets = Targets()
        for segment in prompt_segments(tokens, first, self.contract, wants_logits=wants_logits):
            [targets] = self.run([segment])
            on_chunk(segment.tokens)
        return targets

    def keep_path(self, segment: Segment, path: Sequence[int]) -> None:
        """Move the cache positions of an accepted path to the front of the segment's; a chain's are there already."""
        if segment.parents is not None:
            self._session.compact(segment.cache_length, np.array(path, np.int64))

    def _buffer(self, count: int) -> Float32:
        """Float32 [count or more, V]; large enough from the start, so that no round allocates."""
        if self._logits is None or len(self._logits) < count:
            self._logits = np.empty((max(count, self._most_logits), self.contract.vocab_size), np.float32)
        return self._logits


def prompt_segments(tokens: Int64, first: int, contract: Contract, *, wants_logits: bool = False) -> Iterator[Segment]:
    """The passes that feed `tokens` int64 [n] from position `first` on: chunks, each with the target after its last."""
    for chunk in contract.prompt_chunks(len(tokens), first):
        yield Segment(tokens=tokens[chunk], cache_length=chunk.start, num_logits=1, wants_logits=wants_logits)
