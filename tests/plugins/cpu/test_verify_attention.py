"""VerifyAttention on every level that this CPU runs: against its reference, and a tree against the replayed chain."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.probes.tree_invariance import random_tree
from engines.tree import ancestor_mask, depths
from plugins.verify_attention import verify_attention
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
CAPACITY = 2176
# Name → operator, type.
CACHES = {
    "float32": ("VerifyAttention", np.dtype(np.float32)),
    "float16": ("VerifyAttentionFloat16", np.dtype(np.float16)),
    "bfloat16": ("VerifyAttentionBfloat16", np.dtype(ml_dtypes.bfloat16)),
}


class Case:
    """Random caches, rotary tables and norms of one shape."""

    def __init__(
        self, seed, *, heads=4, groups=2, size=16, rotary=None, norms=False, softcap=0.0, window=0, cache="float32"
    ):
        self.random = random = np.random.default_rng(seed)
        self.heads, self.groups, self.size = heads, groups, size
        self.operator, self.dtype = CACHES[cache]
        self.key, self.value = (
            random.standard_normal((groups, CAPACITY, size), np.float32).astype(self.dtype) for _ in range(2)
        )
        angles = np.outer(np.arange(CAPACITY), 10000.0 ** -np.linspace(0, 1, (rotary or size) // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.norms = [random.uniform(0.5, 1.5, size).astype(np.float32) for _ in range(2)] if norms else [None, None]
        self.options = {"epsilon": 1e-5, "softcap": softcap, "window": window}

    def rows(self, count):
        return self.random.standard_normal((count, (self.heads + 2 * self.groups) * self.size), np.float32)

    def run(self, qkv, length, *, level, parents=None, threads=1, in_place=True):
        """Context, keys and values of the new tokens; the caches of the case stay as they are."""
        count = len(qkv)
        depth = np.arange(count) if parents is None else depths(np.asarray(parents))
        mask = None if parents is None else ancestor_mask(np.asarray(parents))[None]
        results = run_operator(
            self.operator,
            [
                *(
                    qkv[None],
                    self.key.copy()[None],
                    self.value.copy()[None],
                    np.array([length]),
                    (length + depth)[None],
                ),
                *(self.cos, self.sin, mask, *self.norms),
            ],
            {
                "num_heads": self.heads,
                "kv_num_heads": self.groups,
                "local_window_size": self.options["window"],
                "scale": float(self.size**-0.5),
                "softcap": self.options["softcap"],
                "epsilon": self.options["epsilon"],
            },
            level=level,
            outputs=3,
            in_place={1: 1, 2: 2} if in_place else None,
            threads=threads,
        )
        new = slice(length, length + count)
        return results[0][0], results[1][0][:, new], results[2][0][:, new]

    def reference(self, qkv, length, parents=None):
        key, value, count = self.key.astype(np.float32), self.value.astype(np.float32), len(qkv)
        depth = np.arange(count) if parents is None else depths(np.asarray(parents))
        context = verify_attention(
            *(qkv, key, value, length, length + depth, self.cos, self.sin),
            num_heads=self.heads,
            tree_mask=None if parents is None else ancestor_mask(np.asarray(parents)),
            q_norm=self.norms[0],
            k_norm=self.norms[1],
            cache_dtype=self.dtype,
            **self.options,
        )
        new = slice(length, length + count)
        return context, key[:, new], value[:, new]

    def chain(self, qkv, length, *, level):
        """Token after token, each alone."""
        kept = self.key.copy(), self.value.copy()
        contexts = []
        for row in range(len(qkv)):
            context, key, value = self.run(qkv[row : row + 1], length + row, level=level)
            contexts.append(context[0])
            self.key[:, length + row], self.value[:, length + row] = key[:, 0], value[:, 0]
        self.key, self.value = kept
        return np.stack(contexts)


@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None, max_examples=40, database=None, derandomize=True)
@given(
    rows=st.integers(1, 64),
    length=st.sampled_from([0, 1, 2, 15, 31, 62, 63, 64, 65, 127, 128, 200, 300]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (8, 1)]),
    size=st.sampled_from([2, 8, 16, 24, 64, 96, 128, 160, 256]),
    partial=st.booleans(),
    norms=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
    window=st.sampled_from([0, 1, 7, 64, 100]),
    tree=st.booleans(),
    cache=st.sampled_from(sorted(CACHES)),
    seed=st.integers(0, 2**31),
)
def test_it_equals_the_reference(level, rows, length, heads, size, partial, norms, softcap, window, tree, cache, seed):
    rotary = size // 2 // 2 * 2 if partial and size >= 4 else size
    case = Case(
        seed,
        heads=heads[0],
        groups=heads[1],
        size=size,
        rotary=rotary,
        norms=norms,
        softcap=softcap,
        window=window,
        cache=cache,
    )
    qkv = case.rows(rows)
    parents = random_tree(case.random, rows)[0] if tree else None
    context, key, value = case.run(qkv, length, level=level, parents=parents)
    expected = case.reference(qkv, length, parents)
    # Scores are sums of `size` products; their float32 error, times the spread of what is weighted. In 16 bits a key
    # may fall to the other side of a rounding: one step of one value among those that a score sums.
    step = {"float32": 0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[cache]
    np.testing.assert_allclose(context, expected[0], atol=2e-5 + step / 4, rtol=2e-5)
    np.testing.assert_allclose(key.astype(np.float32), expected[1], atol=2e-6, rtol=2e-6 + step)
    np.testing.assert_array_equal(value.astype(np.float32), expected[2])


@pytest.mark.parametrize(
    ("size", "cache"), [(64, "float32"), (96, "float32"), (128, "float32"), (256, "float32"), (64, "float16")]
)
def test_a_tree_has_the_bits_of_the_replayed_chain(size, cache):
    """Random trees of up to 32 tokens, junk siblings before and after, cache lengths from 0 to 2000."""
    case = Case(size, heads=6, groups=2, size=size, norms=size == 128, cache=cache)
    for length in (0, 1, 40, 63, 64, 65, 127, 128, 700, 2000):
        for width in (1, 2, 7, 16, 32):
            parents, path = random_tree(case.random, width)
            qkv = case.rows(width)
            expected = case.chain(qkv[path], length, level=LEVELS[0]) if path else np.empty((0,))
            for threads in (1, 2):
                context, _, _ = case.run(qkv, length, level=LEVELS[0], parents=parents, threads=threads)
                assert context[path].tobytes() == expected.tobytes(), (length, width, threads)


@pytest.mark.parametrize("options", [{"window": 50}, {"softcap": 20.0}, {"window": 50, "softcap": 3.0, "norms": True}])
def test_windows_and_soft_caps_count_positions_of_the_path(options):
    case = Case(5, **options)
    for length in (0, 20, 64, 130):
        parents, path = random_tree(case.random, 24)
        qkv = case.rows(24)
        context, _, _ = case.run(qkv, length, level=LEVELS[0], parents=parents)
        assert context[path].tobytes() == case.chain(qkv[path], length, level=LEVELS[0]).tobytes()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [16, 24, 64, 256])
def test_a_token_has_the_same_bits_at_every_width_and_on_every_level(level, size):
    """256 tokens after a long cache are streamed by tokens, 1 to 32 cut into blocks: the same bits."""
    case = Case(7, heads=8, groups=2, size=size)
    qkv, length = case.rows(256), 1200
    whole, keys, _ = case.run(qkv, length, level=LEVELS[0], threads=2)
    np.testing.assert_array_equal(case.run(qkv[:40], length, level=level)[0], whole[:40])
    for start, width in ((0, 1), (1, 2), (3, 5), (8, 17), (25, 32), (57, 3)):
        case.key[:, length : length + 256] = keys
        case.value[:, length : length + 256] = case.run(qkv, length, level=LEVELS[0])[2]
        rows, _, _ = case.run(qkv[start : start + width], length + start, level=level)
        np.testing.assert_array_equal(rows, whole[start : start + width], err_msg=f"{start}, {width}")


def test_a_chain_written_as_a_tree_is_a_chain():
    case = Case(1)
    qkv = case.rows(9)
    plain = case.run(qkv, 70, level=LEVELS[0])[0]
    np.testing.assert_array_equal(case.run(qkv, 70, level=LEVELS[0], parents=list(range(-1, 8)))[0], plain)


def test_what_lies_in_unused_slots_does_not_matter():
    case = Case(2)
    qkv = case.rows(12)
    parents, _ = random_tree(case.random, 12)
    before = case.run(qkv, 100, level=LEVELS[0], parents=parents)[0]
    case.key[:, 100:], case.value[:, 100:] = np.nan, np.inf
    np.testing.assert_array_equal(case.run(qkv, 100, level=LEVELS[0], parents=parents)[0], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.__setitem__(3, np.array([CAPACITY])), "2 tokens after 2176 do not fit a cache of 2176"),
        (lambda inputs: inputs.__setitem__(3, np.array([-1])), "2 tokens after -1"),
        (lambda inputs: inputs.__setitem__(4, np.array([[0, CAPACITY]])), "position 2176 came"),
        (
            lambda inputs: inputs.__setitem__(7, np.array([[[True, True], [True, True]]])),
            "row 0 of the tree mask",
        ),
        (lambda inputs: inputs.__setitem__(7, np.array([[[True, False], [True, False]]])), "does not see itself"),
        (lambda inputs: inputs.__setitem__(7, np.ones((1, 3, 3), np.bool_)), "tree mask of 9 values for 2 tokens"),
        (lambda inputs: inputs.__setitem__(0, np.zeros((1, 2, 127), np.float32)), "rows of 127 values came"),
        (lambda inputs: inputs.__setitem__(8, np.ones(16, np.float32)), "norms do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(1)
    inputs = [
        *(case.rows(2)[None], case.key[None], case.value[None], np.array([3]), np.array([[3, 4]])),
        *(case.cos, case.sin, None, None, None),
    ]
    change(inputs)
    attributes = {"num_heads": 4, "kv_num_heads": 2, "local_window_size": 0, "scale": 0.25}
    with pytest.raises(Exception, match=message):
        run_operator(
            "VerifyAttention",
            inputs,
            attributes | {"softcap": 0.0, "epsilon": 0.0},
            level=LEVELS[0],
            outputs=3,
        )


def test_where_past_and_present_are_two_buffers_the_committed_positions_are_copied():
    case = Case(9)
    qkv = case.rows(5)
    for parents in (None, [-1, 0, 0, 2, 1]):
        here = case.run(qkv, 130, level=LEVELS[0], parents=parents)
        there = case.run(qkv, 130, level=LEVELS[0], parents=parents, in_place=False)
        for one, other in zip(here, there, strict=True):
            np.testing.assert_array_equal(one, other)
