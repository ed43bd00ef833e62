"""Recorded passes: what is recorded when, and what an interrupt leaves."""

import pytest

from engines.cuda.graphs import Graphs
from engines.gpu.host_device import HostDevice


def test_a_pass_runs_is_recorded_and_is_replayed():
    device, ran = HostDevice(), []
    graphs = Graphs(device, lambda sizes: device.enqueue(lambda: ran.append(sizes)), enabled=True)
    for _ in range(4):
        graphs.run("a")
    assert (ran, len(graphs)) == (["a"] * 4, 1)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_while_a_pass_is_recorded_leaves_the_stream_as_it_was(stop):
    device, ran, stops = HostDevice(), [], []

    def enqueue(sizes):
        device.enqueue(lambda: ran.append(sizes))
        if stops:
            raise stops.pop()

    graphs = Graphs(device, enqueue, enabled=True)
    graphs.run("a")
    stops.append(stop)
    with pytest.raises(stop):
        graphs.run("a")
    # Another size runs at once, and the first is recorded after all.
    graphs.run("b")
    device.synchronize()
    graphs.run("a")
    assert (ran, len(graphs)) == (["a", "b", "a"], 1)
