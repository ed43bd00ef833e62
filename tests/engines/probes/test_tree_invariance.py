"""The tree probe finds a path that depends on what branches off it, and passes one that does not."""

import numpy as np
import pytest

from engines.cache_rows import HostCaches
from engines.contract import Contract
from engines.probes.tree_invariance import random_tree, trees_are_exact
from engines.tree import depths


class TreeSession(HostCaches):
    """Logits follow from a token's own path; `leak` adds what a real kernel might let through."""

    def __init__(self, leak=lambda rows, row: 0.0, *, takes_trees=True):
        self.contract = Contract(num_layers=1, num_kv_heads=1, head_size=2, vocab_size=50, max_length=200, capacity=256)
        self.takes_trees = takes_trees
        self.caches = [(np.zeros((1, 1, 256, 2), np.float32), np.zeros((1, 1, 256, 2), np.float32))]
        self._leak = leak

    def run_logits(self, token_ids, cache_length, num_logits_rows, parents=None):
        count = len(token_ids)
        parents = list(range(-1, count - 1)) if parents is None else parents
        keys = self.caches[0][0][0, 0]
        depth = depths(np.asarray(parents))
        own = np.array([(token, cache_length + at) for token, at in zip(token_ids, depth, strict=True)], np.float32)
        rows = []
        for row in range(count):
            path, at = [], row
            while at >= 0:
                path.append(at)
                at = parents[at]
            seen = keys[:cache_length].sum(dtype=np.float64) + own[path[::-1]].sum(dtype=np.float64)
            rows.append(np.sin(np.arange(5) + seen + self._leak(token_ids, row)).astype(np.float32))
        keys[cache_length : cache_length + count] = own
        return np.stack(rows[count - num_logits_rows :])


def test_an_exact_session_passes():
    assert trees_are_exact(TreeSession())


@pytest.mark.parametrize(
    "leak",
    [
        # A later sibling, a token that is not the first, the number of tokens.
        lambda rows, row: 1e-5 * float(rows[-1]),
        lambda rows, row: 1e-5 * (row > 5),
        lambda rows, row: 1e-5 * (len(rows) > 20),
    ],
)
def test_a_leak_is_found(leak):
    assert not trees_are_exact(TreeSession(leak))


def test_a_session_without_trees_has_none_that_are_exact():
    assert not trees_are_exact(TreeSession(takes_trees=False))


def test_random_trees_have_branches_before_between_and_after_their_path():
    random = np.random.default_rng(0)
    parents, path = random_tree(random, 32)
    assert 4 < len(path) < 28
    assert all(parent < row for row, parent in enumerate(parents))
    assert [parents[row] for row in path] == [-1, *path[:-1]]
    siblings = [row for row in range(32) if row not in path]
    assert min(siblings) < max(path)
