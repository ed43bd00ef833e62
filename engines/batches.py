"""What sessions check of a batch before they run it, in the same words on every back end."""

from collections.abc import Sequence

from engines.cache_rows import check_slot
from engines.contract import Contract
from engines.session import Positions
from quasar.errors import GenerationError


def check_batch(
    batch: Sequence[Positions],
    contract: Contract,
    *,
    num_slots: int,
    most_sequences: int,
    max_positions: int,
    spare: int = 0,
) -> None:
    """Raise `GenerationError` unless a batch fits a session; trees are looked at where they are packed.

    Args:
        most_sequences: of one batch.
        max_positions: of all of them together.
        spare: positions after the new ones that a graph overwrites.
    """
    if not 0 < len(batch) <= most_sequences:
        raise GenerationError(f"a batch of {len(batch)} sequences came; 1 to {most_sequences} were expected")
    fed = 0
    for one in batch:
        width = len(one.tokens)
        check_slot(one.slot, num_slots)
        if not width or not 0 <= one.num_logits <= width:
            raise GenerationError(
                f"a sequence of {width} positions with targets after {one.num_logits} of them came; one or more "
                "positions, and not more targets, were expected"
            )
        if not 0 <= one.cache_length <= contract.capacity - width - spare:
            raise GenerationError(
                f"{width} positions after {one.cache_length} do not fit a cache of {contract.capacity - spare}"
            )
        fed += width
    if fed > max_positions:
        raise GenerationError(f"{fed} positions were fed in one pass; this session takes up to {max_positions}")
    if len({one.slot for one in batch}) < len(batch):
        slots = [one.slot for one in batch]
        raise GenerationError(f"sequences of one batch are in cache slots {slots}; each in another was expected")


def only_sequence(batch: Sequence[Positions]) -> Positions:
    """The one sequence of a batch; raises `GenerationError` for more, on sessions that take no more."""
    if len(batch) != 1:
        raise GenerationError(f"a batch of {len(batch)} sequences came; this engine's passes take one")
    check_slot(batch[0].slot, 1)
    return batch[0]
