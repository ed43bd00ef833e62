"""Trees: parents, masks, and that a path through a tree is a chain as far as float32 can tell."""

import numpy as np
import pytest

from engines.probes.tree_invariance import random_tree
from engines.tree import ancestor_mask, check_parents, depths, pack_paths, pack_trees
from quasar.checkpoints import open_checkpoint
from quasar.errors import GenerationError
from tests.graphs import contract_of, export_graphs, lowered_session

# 0 ── 1 ── 3        rows 0, 2, 4, 5 form one path, 0, 1, 3 the other
#  └── 2 ── 4 ── 5
PARENTS = np.array([-1, 0, 0, 1, 2, 4])


def test_depths_and_ancestors():
    np.testing.assert_array_equal(depths(PARENTS), [0, 1, 1, 2, 2, 3])
    mask = ancestor_mask(PARENTS)
    assert [np.flatnonzero(row).tolist() for row in mask] == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 2, 4, 5]]
    np.testing.assert_array_equal(ancestor_mask(np.arange(-1, 4)), np.tril(np.ones((5, 5), bool)))


def test_packed_trees_are_those_of_one_at_a_time(tiny_model):
    """As masks, and as paths."""
    contract = contract_of(open_checkpoint(str(tiny_model)).spec, tree_mask=True)
    random = np.random.default_rng(0)
    for count in (1, 2, 7):
        widths = random.integers(1, contract.max_width + 1, count).tolist()
        trees = [np.array(random_tree(random, width)[0]) for width in widths]
        trees[0] = np.arange(-1, widths[0] - 1)
        depth, masks = pack_trees(list(zip(trees, widths, strict=True)), contract)
        np.testing.assert_array_equal(depth, np.concatenate([depths(one) for one in trees]))
        np.testing.assert_array_equal(masks, np.concatenate([ancestor_mask(one).reshape(-1) for one in trees]))
        expected = [np.flatnonzero(row) for one in trees for row in ancestor_mask(one)]
        depth, paths = pack_paths(list(zip(trees, widths, strict=True)), contract)
        assert paths.shape == (sum(widths), contract.max_width)
        for path, row, place in zip(paths, expected, depth, strict=True):
            np.testing.assert_array_equal(path[: place + 1], row)


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([([-1, 0], 2), ([0, 0], 2)], r"parents are \[0, 0\]; for 2"),
        ([([-1, 0], 2), ([-1, -2], 2)], r"parents are \[-1, -2\]; for 2"),
        # As many as there are tokens, but not where they are.
        ([([-1], 2), ([-1, 0, 1], 2)], r"parents are \[-1\]; for 2"),
        ([([-1, 0], 3)], r"parents are \[-1, 0\]; for 3"),
        ([(np.arange(-1, 16), 17)], "a tree of 17 tokens was fed, but this engine has trees of up to 16 tokens"),
    ],
)
def test_packed_trees_that_are_none_are_refused(tiny_model, trees, message):
    contract = contract_of(open_checkpoint(str(tiny_model)).spec, tree_mask=True)
    for pack in (pack_trees, pack_paths):
        with pytest.raises(GenerationError, match=message):
            pack(trees, contract)


@pytest.fixture(scope="module")
def trees(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    contract = export_graphs(open_checkpoint(str(tiny_model)), folder, tree_mask=True)
    return folder, contract


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, -2], [-1, 0, 3], [-1]])
def test_impossible_parents_are_refused(trees, parents):
    with pytest.raises(GenerationError, match="indices of earlier ones"):
        check_parents(parents, max(2, len(parents)), trees[1])


def test_trees_need_an_engine_that_takes_them(trees, tiny_model):
    _, contract = trees
    with pytest.raises(GenerationError, match="17 tokens was fed, but this engine has trees of up to 16 tokens"):
        check_parents(np.arange(-1, 16), 17, contract)
    chain_only = contract_of(open_checkpoint(str(tiny_model)).spec)
    with pytest.raises(GenerationError, match="no tree mask: build with --tree-mask"):
        check_parents(PARENTS, 6, chain_only)


@pytest.mark.parametrize("cached", [1, 5, 100])
def test_a_path_through_a_tree_is_a_chain(trees, cached):
    folder, contract = trees
    random = np.random.default_rng(cached)
    prompt, fed = random.integers(0, 320, cached), random.integers(0, 320, len(PARENTS))
    tree, chain = lowered_session(folder, contract), lowered_session(folder, contract)
    for session in (tree, chain):
        session.run(prompt, 0, 1)
    logits = tree.run_logits(fed, cached, len(fed), PARENTS)
    for path in ([0, 2, 4, 5], [0, 1, 3]):
        # float32 sums of 16 to 300 terms in another order; seen: 2e-6.
        np.testing.assert_allclose(logits[path], chain.run_logits(fed[path], cached, len(path)), atol=2e-5, rtol=0)
    # The mask matters: as a chain the same rows give other logits.
    assert np.abs(chain.run_logits(fed, cached, len(fed)) - logits)[2:].max() > 0.01


def test_an_empty_cache_takes_no_tree(trees):
    folder, contract = trees
    with pytest.raises(GenerationError, match="feed at least one token"):
        lowered_session(folder, contract).run(np.arange(6), 0, 6, PARENTS)


def test_a_chain_has_the_bits_of_a_chain_only_graph(trees, tiny_model, tmp_path):
    folder, contract = trees
    plain = export_graphs(open_checkpoint(str(tiny_model)), tmp_path)
    tokens = np.random.default_rng(1).integers(0, 320, 40)
    a, b = lowered_session(folder, contract), lowered_session(tmp_path, plain)
    for start in range(0, 40, 5):
        rows = [session.run_logits(tokens[start : start + 5], start, 5).copy() for session in (a, b)]
        np.testing.assert_array_equal(*rows)
