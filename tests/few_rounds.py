"""Latencies are measured in the fewest rounds: two processes of tests keep each other from getting the same twice."""

import pytest

from engines import latency, noise


def take_few_rounds(patch: pytest.MonkeyPatch) -> None:
    """No test looks at how long a pass took but those of the measurement: tests/engines/test_latency.py."""
    patch.setattr(latency, "AGREEMENT", float("inf"))
    patch.setattr(noise, "_MOST_ATTEMPTS", 1)
