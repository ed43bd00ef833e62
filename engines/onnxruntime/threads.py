"""One thread pool for every engine of a process, where the process wants it."""

import os

from engines.machine import usable_cores
from quasar.errors import EngineError

_shared: int | None = None


def share_threads(threads: int = 0) -> None:
    """Let all engines that are loaded from now on share one pool of `threads` (0: one per usable core).

    Without it each engine has its own pool, whose idle threads spin for a moment after a pass and take a core from an
    engine that runs in turn. Opt-in, because ONNX Runtime then demands of every other session in the process that it
    is made with `use_per_session_threads = False`.

    Raises:
        EngineError: a pool of another size exists already.
    """
    global _shared
    if _shared == threads:
        return
    import onnxruntime as ort

    try:
        ort.set_global_thread_pool_sizes(threads or bound_cores(), 1)
    except Exception as error:  # the library's errors share no public base
        raise EngineError(
            f"the process has a shared thread pool already, so {threads} threads cannot be set: {error}"
        ) from None
    _shared = threads


def bound_cores() -> int:
    """The cores that this process is bound to, of which ONNX Runtime does not know; 0 where it may use all."""
    allowed = usable_cores()
    return allowed if allowed < (os.cpu_count() or 1) else 0


def shared_threads() -> int | None:
    """The size that `share_threads` was called with in this process, or None."""
    return _shared
