"""The driver's calls, by a stand-in of cuda-python: nothing here needs a GPU."""

import threading
from types import SimpleNamespace

import pytest

from engines.gpu import driver
from engines.gpu.driver import CudaDevice


class Recorded:
    """Every call succeeds, is noted with its thread, and returns one value."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_OUT_OF_MEMORY=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((threading.get_ident(), name))
            return 0, 7

        return call


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(driver, "_driver", Recorded)
    monkeypatch.setattr(driver, "_describe", lambda driver, device: None)
    with CudaDevice() as device:
        yield device


@pytest.mark.parametrize(
    "work",
    [
        lambda device: device.synchronize(),
        lambda device: device.launch_graph(7),
        lambda device: device.begin_capture(),
        lambda device: device.end_capture(),
        lambda device: device.abandon_capture(),
        lambda device: device.destroy_graph(7),
        lambda device: device.allocate(8),
    ],
)
def test_a_thread_that_never_called_the_driver_has_its_context_first(device, work):
    """A pass may be a replayed graph, and the thread that makes it one that has done nothing else."""
    calls = device._driver.calls
    calls.clear()
    thread = threading.Thread(target=work, args=(device,))
    thread.start()
    thread.join()
    names = [name for ident, name in calls if ident == thread.ident]
    assert names[0] == "cuCtxSetCurrent"
    assert len(names) > 1
