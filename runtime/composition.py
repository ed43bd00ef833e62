"""What a pass holds: how many positions of each prompt beside the sequences that decode (pure functions)."""

from collections.abc import Sequence


def chunk_sizes(left: Sequence[int], budget: int) -> list[int]:
    """How many positions of each prompt the next pass takes, first come first served: int per prompt, 0 or more.

    The first prompt in line gets half of the budget at least, so that none starves. The other half goes to prompts
    that end in this pass, shortest first: they need not wait for a long one before them. What is left goes down the
    line.

    Args:
        left: positions that each prompt still has to be fed, in the order of the line.
        budget: positions of prompts in this pass, 1 or more.
    """
    if not left:
        return []
    sizes = [0] * len(left)
    sizes[0] = min(left[0], max(1, budget // 2))
    rest = budget - sizes[0]
    for place in sorted(range(1, len(left)), key=lambda place: left[place]):
        if left[place] > rest:
            break
        sizes[place] = left[place]
        rest -= left[place]
    for place, wanted in enumerate(left):
        more = min(rest, wanted - sizes[place])
        sizes[place] += more
        rest -= more
    return sizes
