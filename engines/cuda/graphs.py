"""Passes that were recorded as CUDA graphs, by their sizes: the first of a kind runs, the second is recorded."""

import logging
from collections import OrderedDict
from collections.abc import Callable

from engines.cuda.pass_sizes import PassSizes
from engines.gpu.device import Device, RecordedWork
from quasar.errors import EngineError

_log = logging.getLogger("quasar.engines")
# A graph takes memory of the GPU for each of its launches, some hundred: the one that was not used for longest makes
# room. Sequences that decode together for a while use a dozen; whatever comes again is recorded in one pass.
MOST_GRAPHS = 128


class Graphs:
    """Runs passes that put their work on a device's stream, and replays them."""

    def __init__(self, device: Device, enqueue: Callable[[PassSizes], None], *, enabled: bool) -> None:
        """`enqueue` puts a pass of such sizes on the stream; it reads nothing but what lies at fixed addresses."""
        self._device, self._enqueue, self.enabled = device, enqueue, enabled
        self._recorded: OrderedDict[PassSizes, RecordedWork] = OrderedDict()
        self._seen: set[PassSizes] = set()

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, sizes: PassSizes) -> None:
        """Put a pass on the stream: launch by launch, or its graph."""
        if not self.enabled or sizes not in self._seen:
            # The first launch of a kernel may load it, which must not be recorded.
            self._seen.add(sizes)
            self._enqueue(sizes)
            return
        work = self._recorded.get(sizes)
        if work is None:
            work = self._record(sizes)
        if work is None:
            self._enqueue(sizes)
            return
        self._recorded.move_to_end(sizes)
        work.launch()

    def close(self) -> None:
        """Free them."""
        for work in self._recorded.values():
            work.close()
        self._recorded.clear()

    def _record(self, sizes: PassSizes) -> RecordedWork | None:
        while len(self._recorded) >= MOST_GRAPHS:
            # Nothing of it runs any more: every pass is waited for.
            self._recorded.popitem(last=False)[1].close()
        try:
            self._device.begin_capture()
            self._enqueue(sizes)
            work = self._recorded[sizes] = self._device.end_capture()
        except EngineError as error:
            self._device.abandon_capture()
            self.enabled = False
            _log.warning("passes cannot be recorded as CUDA graphs (%s): they run without", error)
            return None
        except BaseException:
            # An interrupt: a stream that goes on recording would run nothing any more.
            self._device.abandon_capture()
            raise
        return work
