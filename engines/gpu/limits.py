"""What fits a GPU, in the same words on every back end: passes, slots of the cache, and the longest context."""

from engines.contract import Contract
from quasar.errors import GenerationError

# Slots of an engine whose caller does not say how many, at most; and their share of the memory that is free beside the
# weights: the rest is for buffers, for recorded passes, and for whoever else uses the GPU.
_MOST_SLOTS, _SHARE = 16, 0.5


def check_pass(contract: Contract, width: int, num_logits_rows: int, cache_length: int) -> None:
    """Raise `GenerationError` unless so many tokens may be fed and asked for, and fit the cache."""
    if not 0 < width <= contract.prefill_chunk or not 0 < num_logits_rows <= min(width, contract.max_width):
        raise GenerationError(
            f"{width} tokens with {num_logits_rows} asked for were fed; this engine takes up to "
            f"{contract.prefill_chunk} tokens and gives up to {contract.max_width} back"
        )
    if not 0 <= cache_length <= contract.capacity - width:
        raise GenerationError(f"{width} tokens after {cache_length} do not fit a cache of {contract.capacity}")


def slots_that_fit(free_bytes: int, weight_bytes: int, slot_bytes: int) -> int:
    """Slots whose positions take half of what is free beside the weights; 16 at most, 1 at least."""
    return max(1, min(_MOST_SLOTS, int(_SHARE * (free_bytes - weight_bytes) / slot_bytes)))


def length_advice(length: int, contract: Contract, *, slots: int = 0) -> str:
    """What to do where `length` is the longest context that fits the GPU.

    `slots`: so many fit without another length, fewer than were asked for; 0: none do.
    """
    ways = [f"load with max_sequences={slots}"] if slots else []
    if length >= 2 * contract.max_width:
        ways.append(f"build with --max-length {length}")
    return f"{', '.join(ways) or 'no --max-length fits beside it'}, or free memory on the GPU"
