"""The probe for trees: a path has the bits of the same tokens as a chain, whatever branches lie between its tokens."""

from collections.abc import Sequence

import numpy as np

from engines.session import Session, fill_randomly

_SEED = 20261
_TREES = 3
# Around the blocks in which attention goes over the cache, and short and long contexts.
LENGTHS = (1, 2, 17, 63, 64, 65, 100, 127, 128, 256, 1000)


def trees_are_exact(session: Session, lengths: Sequence[int] = LENGTHS, *, chain: int = 1) -> bool:
    """Feed random trees after random caches, and compare every position of one path with a chain, bit for bit.

    Args:
        lengths: committed positions; those that do not fit are left out.
        chain: the width at which chains are exact.

    A session that takes no trees has none that are exact.
    """
    if not session.takes_trees:
        return False
    random = np.random.default_rng(_SEED)
    contract, width = session.contract, session.contract.max_width
    for length in (one for one in lengths if one + width <= contract.max_length):
        fill_randomly(session, random, 0, length)
        tokens = random.integers(0, contract.vocab_size, width + chain)
        expected = [
            session.run_logits(tokens[index : index + chain], length + index, chain, None)[0].copy()
            for index in range(width)
        ]
        for _ in range(_TREES):
            parents, path = random_tree(random, width)
            fed = random.integers(0, contract.vocab_size, width)
            fed[path] = tokens[: len(path)]
            outputs = session.run_logits(fed, length, width, parents)
            if any(outputs[index].tobytes() != expected[depth].tobytes() for depth, index in enumerate(path)):
                return False
    return True


def random_tree(random: np.random.Generator, width: int) -> tuple[list[int], list[int]]:
    """Parents of `width` tokens, and the indices of one path from the root: about half; the others branch off."""
    parents: list[int] = []
    path: list[int] = []
    for index in range(width):
        if random.random() < 0.5:
            parents.append(path[-1] if path else -1)
            path.append(index)
        else:
            parents.append(int(random.integers(-1, index)) if index else -1)
    return parents, path
