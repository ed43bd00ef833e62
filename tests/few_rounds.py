"""Latencies are measured in the fewest rounds: two processes of tests keep each other from getting the same twice."""

import pytest

from engines import latency, noise

_FEWEST = ((latency, "AGREEMENT", float("inf")), (noise, "_MOST_ATTEMPTS", 1))
# This module is imported before anything is set.
_OWN = tuple((module, name, getattr(module, name)) for module, name, _ in _FEWEST)


def take_few_rounds(patch: pytest.MonkeyPatch) -> None:
    """No test looks at how long a pass took but those of the measurement: tests/engines/test_latency.py."""
    for setting in _FEWEST:
        patch.setattr(*setting)


def take_as_many_rounds_as_it_takes(patch: pytest.MonkeyPatch) -> None:
    """As for users."""
    for setting in _OWN:
        patch.setattr(*setting)
