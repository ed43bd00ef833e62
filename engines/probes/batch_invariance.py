"""The probe for shared passes: a sequence's positions have the bits that they have in a pass of their own.

Whatever neighbours there are, in whichever slots and order, with chains, trees and chunks of prompts among them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.probes.tree_invariance import random_tree
from engines.session import Positions, Session, fill_randomly

_SEED = 20263
_BATCHES = 6
# Cached positions of the sequences: around the blocks in which attention goes over the cache, and nothing.
_LENGTHS = (0, 1, 17, 63, 64, 100, 256, 700)
# Positions of one sequence, at most: a chunk of a prompt beside others.
_MOST_CHUNK = 96
# Positions of a pass, at most: as many as the widest one whose latency is known.
_MOST_POSITIONS = 128


def batches_are_exact(
    session: Session, *, trees: bool, batches: int = _BATCHES, most_positions: int = _MOST_POSITIONS
) -> bool:
    """Feed random batches, and every sequence again in a pass of its own, and compare outputs and caches bit for bit.

    Args:
        trees: whether trees are exact, so that some sequences may be fed as one.
        batches: how many, of up to `most_positions` each.

    A session whose sequences do not share passes has none that are exact.
    """
    count = min(session.max_sequences, session.num_slots)
    if count < 2:
        return False
    random = np.random.default_rng(_SEED)
    # Of a cut-down graph, hidden states.
    columns = session.run_logits([0], 0, 1).shape[-1]
    for _ in range(batches):
        batch = _random_batch(random, session, count, most_positions, trees=trees)
        for one in batch:
            fill_randomly(session, random, 0, one.cache_length, slot=one.slot)
        total = sum(one.num_logits for one in batch)
        together = _logits(session, batch, (total, columns))
        first = 0
        for one in batch:
            end = one.cache_length + len(one.tokens)
            written = session.read_rows(one.cache_length, end, slot=one.slot)
            alone = _logits(session, [one], (one.num_logits, columns))
            same = alone.tobytes() == together[first : first + one.num_logits].tobytes()
            if not same or written.tobytes() != session.read_rows(one.cache_length, end, slot=one.slot).tobytes():
                return False
            first += one.num_logits
    return True


def _logits(session: Session, batch: Sequence[Positions], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Logits of a pass: float32, of this shape."""
    logits = np.empty(shape, np.float32)
    session.run_batch(batch, logits=logits)
    return logits


def _random_batch(
    random: np.random.Generator, session: Session, count: int, most_positions: int, *, trees: bool
) -> list[Positions]:
    """Two or more sequences in random slots; each a single token, a chain, a tree or a chunk of a prompt."""
    contract = session.contract
    slots = random.permutation(session.num_slots)[: int(random.integers(2, count + 1))]
    lengths = [length for length in _LENGTHS if length + _MOST_CHUNK <= contract.max_length]
    left = min(most_positions, session.max_positions, session.max_logits_rows)
    batch = []
    for place, slot in enumerate(slots.tolist()):
        kind = random.integers(0, 4)
        room = left - (len(slots) - place - 1)
        most = min(room, 1 if kind == 0 else _MOST_CHUNK if kind == 3 else contract.max_width)
        width = int(random.integers(1, most + 1))
        parents = None
        if kind == 2 and trees and session.takes_trees:
            parents = np.array(random_tree(random, width)[0], np.int64)
        batch.append(
            Positions(
                tokens=random.integers(0, contract.vocab_size, width),
                cache_length=int(random.choice(lengths)) if lengths else 0,
                num_logits=width,
                slot=slot,
                parents=parents,
            )
        )
        left -= width
    return batch
