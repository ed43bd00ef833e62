"""What sessions of GPU back ends refuse, in the same words: passes that do not fit, and too little memory."""

from engines.contract import Contract
from quasar.errors import GenerationError


def check_pass(contract: Contract, width: int, num_logits_rows: int, cache_length: int) -> None:
    """Raise `GenerationError` unless so many tokens may be fed and asked for, and fit the cache."""
    if not 0 < width <= contract.prefill_chunk or not 0 < num_logits_rows <= min(width, contract.max_width):
        raise GenerationError(
            f"{width} tokens with {num_logits_rows} asked for were fed; this engine takes up to "
            f"{contract.prefill_chunk} tokens and gives up to {contract.max_width} back"
        )
    if not 0 <= cache_length <= contract.capacity - width:
        raise GenerationError(f"{width} tokens after {cache_length} do not fit a cache of {contract.capacity}")


def length_advice(length: int, contract: Contract) -> str:
    """What to do where `length` is the longest context that fits the GPU."""
    fits = f"build with --max-length {length}" if length >= 2 * contract.max_width else "no --max-length fits beside it"
    return f"{fits}, or free memory on the GPU"
