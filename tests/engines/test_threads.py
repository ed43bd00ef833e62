"""The shared thread pool: its size, where a process may use some of the cores alone."""

import onnxruntime as ort
import pytest

from engines.onnxruntime import threads
from engines.onnxruntime.session_options import session_options


@pytest.fixture
def pools(monkeypatch):
    """What ONNX Runtime is asked for, on a machine of eight cores."""
    asked = []
    monkeypatch.setattr(ort, "set_global_thread_pool_sizes", lambda *sizes: asked.append(sizes))
    monkeypatch.setattr(threads, "_shared", None)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    return asked


@pytest.mark.parametrize(
    ("usable", "asked", "size"),
    [(8, 0, 0), (3, 0, 3), (3, 2, 2), (8, 5, 5)],
    ids=["all: the library's choice", "bound to three", "two of three", "five of eight"],
)
def test_a_bound_process_gets_no_more_threads_than_cores(pools, monkeypatch, usable, asked, size):
    monkeypatch.setattr(threads, "usable_cores", lambda: usable)
    assert session_options(threads=asked, exact_integers=False).intra_op_num_threads == size
    threads.share_threads(asked)
    threads.share_threads(asked)
    assert pools == [(size, 1)]
    assert threads.shared_threads() == asked
