"""Logits of an engine over a fixed sequence, chunk by chunk, as prefill feeds it."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.fidelity import LogitsReader
from engines.session import Session

Float32 = NDArray[np.float32]


def engine_logits(session: Session) -> LogitsReader:
    """Reads logits float32 [positions, V] of a whole sequence, in pieces of at most one prefill chunk."""

    def read(tokens: Sequence[int]) -> Iterator[Float32]:
        chunk = session.max_logits_rows
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            yield session.run_logits(part, start, len(part))

    return read
