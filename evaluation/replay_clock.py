"""The clock of a replay: what passes are said to take, and drafting as it is here."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class ReplayClock:
    """Seconds as a replay counts them: those that pass here while it `ticks`, and those that it is charged."""

    def __init__(self) -> None:
        self.ticks = True
        # Seconds that `charging` was given.
        self.charged = 0.0
        # Seconds that this work took here.
        self._hidden = 0.0

    def __call__(self) -> float:
        """What the clock shows."""
        return self.charged + (time.perf_counter() - self._hidden if self.ticks else 0.0)

    @contextmanager
    def charging(self, seconds: float) -> Iterator[None]:
        """What is done meanwhile takes this long, whatever it takes here."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._hidden += time.perf_counter() - start
            self.charged += seconds
