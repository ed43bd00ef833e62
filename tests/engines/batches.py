"""Random batches against each of their sequences alone, on any back end's session."""

import numpy as np

from engines.probes.tree_invariance import random_tree
from engines.session import Positions


def mixture(random, session, lengths, chunk):
    """Some of the slots in any order: chunks of prompts, single tokens, chains and trees after `lengths`."""
    batch = []
    for slot in random.permutation(session.num_slots)[: random.integers(1, session.num_slots + 1)].tolist():
        kind = random.choice(["chunk", "token", "chain", "tree"])
        widest = session.contract.max_width
        width = {"chunk": int(random.integers(*chunk)), "token": 1}.get(kind, int(random.integers(2, widest + 1)))
        is_tree = kind == "tree" and session.takes_trees and lengths[slot] > 0
        batch.append(
            Positions(
                tokens=random.integers(0, 320, width),
                cache_length=lengths[slot],
                num_logits=int(random.choice([0, 1, width])),
                slot=slot,
                parents=np.array(random_tree(random, width)[0]) if is_tree else None,
            )
        )
    return batch


def check_batches(session, alone, seed, rounds=12, *, chunk=(20, 90), lengths=None):
    """Rounds of mixtures against each of their sequences alone in slot 0 of `alone`, whose cache it is given first.

    Chunks of prompts have so many tokens; `lengths`: what each slot's sequence has cached at the beginning.
    """
    random = np.random.default_rng(seed)
    lengths = [0] * session.num_slots if lengths is None else lengths
    whole = session.contract.capacity
    for slot, length in enumerate(lengths):
        rows = session.read_rows(0, whole, slot=slot)
        rows[:] = 7
        rows[..., :length, :] = random.integers(-3, 3, rows[..., :length, :].shape)
        session.write_rows(0, rows, slot=slot)
    widths = []
    for number in range(rounds):
        batch = mixture(random, session, lengths, chunk)
        before = [session.read_rows(0, whole, slot=slot) for slot in range(session.num_slots)]
        total = sum(one.num_logits for one in batch)
        logits = np.full((total + 1, 320), np.nan, np.float32)
        # Every third round without logits.
        tokens = session.run_batch(batch, logits=None if number % 3 == 2 else logits).copy()
        top = session.top_tokens.copy()
        assert tokens.shape == (total,)
        assert top.shape == (total, 8)
        assert np.isnan(logits[-1]).all()
        first = 0
        for one in batch:
            wanted = slice(first, first + one.num_logits)
            first = wanted.stop
            alone.write_rows(0, before[one.slot])
            asked = max(one.num_logits, 1)
            expected = alone.run_logits(one.tokens, one.cache_length, asked, one.parents)[asked - one.num_logits :]
            if number % 3 != 2:
                assert logits[wanted].tobytes() == expected.tobytes()
            np.testing.assert_array_equal(top[wanted], alone.top_tokens[asked - one.num_logits :])
            np.testing.assert_array_equal(tokens[wanted], expected.argmax(axis=-1))
            assert session.read_rows(0, whole, slot=one.slot).tobytes() == alone.read_rows(0, whole).tobytes()
            before[one.slot] = alone.read_rows(0, whole)
            widths.append(len(one.tokens))
            # A chain is committed, of a tree the deepest path; now and then a sequence ends, and a new one begins.
            lengths[one.slot] = commit(session, one)
            before[one.slot] = session.read_rows(0, whole, slot=one.slot)
            if lengths[one.slot] > 200 or random.random() < 0.1:
                lengths[one.slot] = 0
        for slot in range(session.num_slots):
            assert session.read_rows(0, whole, slot=slot).tobytes() == before[slot].tobytes()
    assert len(set(widths)) > rounds / 2


def commit(session, one):
    """What is cached of a sequence after it accepted all of a chain, or the path to a tree's last token."""
    if one.parents is None:
        return one.cache_length + len(one.tokens)
    path, at = [], len(one.tokens) - 1
    while at >= 0:
        path.append(at)
        at = int(one.parents[at])
    expected = session.read_rows(0, session.contract.capacity, slot=one.slot)
    places = one.cache_length + np.array(path[::-1])
    session.compact(one.cache_length, path[::-1], slot=one.slot)
    after = session.read_rows(0, session.contract.capacity, slot=one.slot)
    moved = slice(one.cache_length, one.cache_length + len(path))
    assert after[..., moved, :].tobytes() == expected[..., places, :].tobytes()
    return moved.stop
