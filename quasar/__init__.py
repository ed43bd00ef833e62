"""The common ground: checkpoints, text, errors, atomic files, the frame of the command lines, and the front door.

import quasar

engine = quasar.load("build/smollm2-w8a8")
print(engine.generate("What is the capital of France?", max_new_tokens=32).text)

The names of `runtime` are here, too; the first use of one imports it.
"""

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime 1.31 reports to Microsoft where nothing else is said, and its thread for that hangs forked processes. It
# looks when it is imported, and every module that imports it imports this package first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from runtime import (
        Conversation,
        Corpus,
        Draft,
        Drafter,
        Engine,
        Event,
        Generation,
        GenerationOptions,
        Memory,
        Metrics,
        PromptLookup,
        Recorder,
        Recycling,
        ResponseFormat,
        Round,
        Stats,
        Suffix,
        TokenLogprob,
        load,
        share_threads,
    )

__version__ = "0.1.0"
__all__ = [
    "Conversation",
    "Corpus",
    "Draft",
    "Drafter",
    "Engine",
    "Event",
    "Generation",
    "GenerationOptions",
    "Memory",
    "Metrics",
    "PromptLookup",
    "Recorder",
    "Recycling",
    "ResponseFormat",
    "Round",
    "Stats",
    "Suffix",
    "TokenLogprob",
    "__version__",
    "load",
    "share_threads",
]


def __getattr__(name: str) -> Any:
    """A name of `runtime`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Upward and late: this package is the lowest, and a program that only builds engines needs no runtime.
    import runtime

    return getattr(runtime, name)


def __dir__() -> list[str]:
    """Everything that can be asked for."""
    return sorted({*globals(), *__all__})
