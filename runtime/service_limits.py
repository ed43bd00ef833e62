"""What an engine lets its requests share: slots, positions of a pass, beginnings of prompts; and how many may wait."""

import os
from dataclasses import dataclass

from quasar.errors import EngineError
from runtime.slots import PREFIX_CACHES, PrefixCache

# Slots of an engine whose caller does not say how many, at most; and the share of the machine's memory for them.
_MOST_SLOTS, _SHARE = 16, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """Limits of an engine that serves many requests; a value that cannot be is an `EngineError`.

    Attributes:
        max_batch_tokens: positions of a pass, of all sequences together; None: as many as the session takes.
        max_stall_ms: milliseconds that a pass with chunks of prompts may take where other sequences decode in it, by
            the latencies known; None: those of a chunk alone (`prefill_chunk` positions), 100 at most.
        queue_limit: requests that may wait beside those that the slots hold; None: any number.
        prefix_cache: whose positions may serve a request's prompt where it begins with the same tokens: "salted", those
            of requests with the same `cache_salt`; "shared", those without a salt serve each other, too; "off".
    """

    max_batch_tokens: int | None = None
    max_stall_ms: float | None = None
    queue_limit: int | None = None
    prefix_cache: PrefixCache = "salted"

    def __post_init__(self) -> None:
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise EngineError(f"max_batch_tokens is {self.max_batch_tokens}; 1 or more was expected")
        if self.queue_limit is not None and self.queue_limit < 0:
            raise EngineError(f"queue_limit is {self.queue_limit}; 0 or more was expected")
        if self.max_stall_ms is not None and not self.max_stall_ms > 0:
            raise EngineError(f"max_stall_ms is {self.max_stall_ms}; more than 0 was expected")
        if self.prefix_cache not in PREFIX_CACHES:
            raise EngineError(f"prefix_cache is {self.prefix_cache!r}; one of {', '.join(PREFIX_CACHES)} was expected")


def default_slots(slot_bytes: int) -> int:
    """Slots whose positions, all of them used, take a quarter of this machine's memory; 16 at most, 1 at least."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        # A system that does not tell.
        return 1
    return max(1, min(_MOST_SLOTS, int(_SHARE * memory / slot_bytes)))
