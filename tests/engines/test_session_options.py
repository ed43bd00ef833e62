"""Options of ONNX Runtime sessions."""

import os

import pytest

from engines.onnxruntime.session_options import session_options


@pytest.mark.parametrize(("allowed", "asked", "threads"), [(1, 0, 1), (3, 0, 3), (4, 0, 0), (1, 2, 2)])
def test_threads_follow_the_cores_that_the_process_may_use(allowed, asked, threads, monkeypatch):
    """With 0, ONNX Runtime counts the machine's cores, of which a container may have been given few."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    assert session_options(threads=asked, exact_integers=False).intra_op_num_threads == threads
