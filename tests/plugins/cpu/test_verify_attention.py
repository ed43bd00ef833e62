"""VerifyAttention on every level that this CPU runs: against its reference, and a tree against the replayed chain."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.probes.tree_invariance import random_tree
from engines.tree import ancestor_mask, depths
from plugins.verify_attention import in_tiers, of_tiers, verify_attention
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
CAPACITY = 2176
# Name → operator, type.
CACHES = {
    "float32": ("VerifyAttention", np.dtype(np.float32)),
    "float16": ("VerifyAttentionFloat16", np.dtype(np.float16)),
    "bfloat16": ("VerifyAttentionBfloat16", np.dtype(ml_dtypes.bfloat16)),
    "int8": ("VerifyAttentionInt8", np.dtype(np.int8)),
    "tiers": ("VerifyAttentionTiers", np.dtype(np.int8)),
    "upper tier": ("VerifyAttentionUpperTier", np.dtype(np.int8)),
}
INTEGERS = ("int8", "tiers", "upper tier")
# What the type of a cache rounds a value of about 1 by, at most.
STEPS = {"float32": 0, "float16": 2.0**-10, "bfloat16": 2.0**-7, **dict.fromkeys(INTEGERS, 0.04)}
# Of the upper tier alone a key that falls to the other side of a rounding may differ by sixteen steps.
STEPS["upper tier"] *= 16


def random_cache(random, shape, dtype):
    """Normal values, or integers of every kind."""
    if dtype == np.int8:
        return random.integers(-127, 128, shape).astype(np.int8)
    return random.standard_normal(shape, np.float32).astype(dtype)


def random_scales(random, groups, size, dtype):
    """Of the channels of an INT8 cache, keys' and values', [G, D] each; (None, None) for other types."""
    if dtype != np.int8:
        return None, None
    return tuple(random.uniform(0.01, 0.04, (groups, size)).astype(np.float32) for _ in range(2))


def check_caches(found, expected, cache):
    """Keys up to a rounding that rotation's last bit tips over, values to the bit."""
    key_step = 1.0 if cache in INTEGERS else 2e-6
    np.testing.assert_allclose(found[0].astype(np.float32), expected[0], atol=key_step, rtol=2e-6 + STEPS[cache])
    if cache in INTEGERS:
        assert (found[0] != expected[0]).mean() < 0.01
    np.testing.assert_array_equal(found[1].astype(np.float32), expected[1])


class Case:
    """Random caches, rotary tables and norms of one shape."""

    def __init__(
        self, seed, *, heads=4, groups=2, size=16, rotary=None, norms="", softcap=0.0, window=0, cache="float32"
    ):
        self.random = random = np.random.default_rng(seed)
        self.heads, self.groups, self.size = heads, groups, size
        self.operator, self.dtype = CACHES[cache]
        self.cache = cache
        self.key, self.value = (random_cache(random, (groups, CAPACITY, size), self.dtype) for _ in range(2))
        self.scales = random_scales(random, groups, size, self.dtype)
        columns = (size if rotary is None else rotary) // 2
        # A layer that does not rotate has no columns, and its positions may lie beyond the rows.
        angles = np.outer(np.arange(CAPACITY if columns else 1), 10000.0 ** -np.linspace(0, 1, columns))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        lengths = {"": (), "head": (size, size), "row": (heads * size, groups * size)}[norms]
        self.norms = [random.uniform(0.5, 1.5, length).astype(np.float32) for length in lengths] or [None, None]
        self.options = {"epsilon": 1e-5, "softcap": softcap, "window": window}

    def rows(self, count):
        return self.random.standard_normal((count, (self.heads + 2 * self.groups) * self.size), np.float32)

    def run(self, qkv, length, *, level, parents=None, threads=1, in_place=True):
        """Context, keys and values of the new tokens; the caches of the case stay as they are."""
        count = len(qkv)
        depth = np.arange(count) if parents is None else depths(np.asarray(parents))
        mask = None if parents is None else ancestor_mask(np.asarray(parents))[None]
        tiers = "tier" in self.cache
        caches = [in_tiers(one) if tiers else one.copy() for one in (self.key, self.value)]
        results = run_operator(
            self.operator,
            [
                *(
                    qkv[None],
                    *(one[None] for one in caches),
                    np.array([length]),
                    (length + depth)[None],
                ),
                *(self.cos, self.sin, mask, *self.norms, None, None, *self.scales),
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
        key, value = (of_tiers(one[0]) if tiers else one[0] for one in results[1:])
        return results[0][0], key[:, new], value[:, new]

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
            cache_scales=self.scales if self.dtype == np.int8 else None,
            upper_alone=self.cache == "upper tier",
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
    rotated=st.sampled_from(["all", "half", "nothing"]),
    norms=st.sampled_from(["", "head", "row"]),
    softcap=st.sampled_from([0.0, 5.0]),
    window=st.sampled_from([0, 1, 7, 64, 100]),
    tree=st.booleans(),
    cache=st.sampled_from(sorted(CACHES)),
    seed=st.integers(0, 2**31),
)
def test_it_equals_the_reference(level, rows, length, heads, size, rotated, norms, softcap, window, tree, cache, seed):
    if "tier" in cache and size % 16:
        # Tiers hold sixteen values side by side.
        size = 16
    rotary = {"all": size, "half": size // 2 // 2 * 2, "nothing": 0}[rotated]
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
    np.testing.assert_allclose(context, expected[0], atol=2e-5 + STEPS[cache] / 4, rtol=2e-5)
    check_caches((key, value), expected[1:], cache)


@pytest.mark.parametrize(
    ("size", "cache"),
    [
        (64, "float32"),
        (96, "float32"),
        (128, "float32"),
        (256, "float32"),
        (64, "float16"),
        (64, "int8"),
        (128, "int8"),
        (64, "tiers"),
        (96, "upper tier"),
    ],
)
def test_a_tree_has_the_bits_of_the_replayed_chain(size, cache):
    """Random trees of up to 32 tokens, junk siblings before and after, cache lengths from 0 to 2000."""
    case = Case(size, heads=6, groups=2, size=size, norms={128: "head", 96: "row"}.get(size, ""), cache=cache)
    for length in (0, 1, 40, 63, 64, 65, 127, 128, 700, 2000):
        for width in (1, 2, 7, 16, 32):
            parents, path = random_tree(case.random, width)
            qkv = case.rows(width)
            expected = case.chain(qkv[path], length, level=LEVELS[0]) if path else np.empty((0,))
            for threads in (1, 2):
                context, _, _ = case.run(qkv, length, level=LEVELS[0], parents=parents, threads=threads)
                assert context[path].tobytes() == expected.tobytes(), (length, width, threads)


def test_tiers_hold_every_integer():
    cache = np.arange(-128, 128, dtype=np.int16).astype(np.int8).reshape(2, 4, 32)
    tiers = in_tiers(cache)
    assert tiers.shape == (4, 4, 16)
    np.testing.assert_array_equal(of_tiers(tiers), cache)
    upper = of_tiers(tiers, upper_alone=True).astype(int)
    assert np.abs(upper - cache).max() == 8
    # The first half of the bytes tells the upper halves.
    tiers[1::2] = 0
    np.testing.assert_array_equal(of_tiers(tiers, upper_alone=True), upper)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [16, 64, 96, 128, 256])
def test_both_tiers_give_the_bits_of_int8(level, size):
    flat, tiers = (Case(4, heads=6, groups=2, size=size, norms="head", cache=cache) for cache in ("int8", "tiers"))
    qkv = flat.rows(20)
    for length in (0, 63, 300):
        for parents in (None, random_tree(np.random.default_rng(size), 20)[0]):
            one, other = (case.run(qkv, length, level=level, parents=parents) for case in (flat, tiers))
            for mine, its in zip(one, other, strict=True):
                assert mine.tobytes() == its.tobytes()


def test_heads_in_tiers_are_whole():
    with pytest.raises(Exception, match="VerifyAttentionTiers: a head size of 24 came; a multiple of 16 was expected"):
        run_operator(
            "VerifyAttentionTiers",
            [
                np.zeros((1, 1, 3 * 24), np.float32),
                *(np.zeros((1, 2, 64, 12), np.int8) for _ in range(2)),
                *(np.zeros(1, np.int64), np.zeros((1, 1), np.int64)),
                *(np.zeros((64, 12), np.float32) for _ in range(2)),
                *[None] * 5,
                *(np.ones((1, 24), np.float32) for _ in range(2)),
            ],
            {
                "num_heads": 1,
                "kv_num_heads": 1,
                "local_window_size": 0,
                "scale": 0.2,
                "softcap": 0.0,
                "epsilon": 1e-5,
            },
            level=LEVELS[0],
            outputs=3,
            in_place={1: 1, 2: 2},
        )


@pytest.mark.parametrize(
    "options",
    [
        {"window": 50},
        {"softcap": 20.0},
        {"window": 50, "softcap": 3.0, "norms": "head"},
        # Heads of every family: sizes, and how many share a key; windows of less than a block, of one, of several.
        {"window": 64, "size": 64, "heads": 3, "groups": 3, "norms": "row"},
        {"window": 3, "size": 96, "heads": 8, "groups": 4, "rotary": 72},
        {"window": 150, "size": 128, "heads": 7, "groups": 1, "rotary": 0},
        {"window": 65, "size": 256, "heads": 8, "groups": 1, "softcap": 50.0, "cache": "bfloat16"},
        {"window": 70, "size": 96, "heads": 6, "groups": 2, "softcap": 20.0, "cache": "int8"},
    ],
)
def test_windows_and_soft_caps_count_positions_of_the_path(options):
    """Windows that begin among the committed positions, at a block's edge, and among the new ones."""
    case = Case(5, **options)
    for length in (0, 20, 64, 130, 700):
        for width in (5, 24):
            parents, path = random_tree(case.random, width)
            qkv = case.rows(width)
            context, _, _ = case.run(qkv, length, level=LEVELS[0], parents=parents, threads=2)
            path = path or [0]
            assert context[path].tobytes() == case.chain(qkv[path], length, level=LEVELS[0]).tobytes()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tree", [False, True])
def test_nothing_outside_a_window_matters(level, tree):
    """What lies before the first token's window may be anything, a value that is no number too."""
    case = Case(3, window=70, size=64)
    qkv, length = case.rows(33), 500
    parents = random_tree(case.random, 33)[0] if tree else None
    before = case.run(qkv, length, level=level, parents=parents)[0]
    seen = length + 1 - 70
    case.key[:, :seen], case.value[:, :seen] = np.nan, np.inf
    np.testing.assert_array_equal(case.run(qkv, length, level=level, parents=parents)[0], before)
    case.value[:, seen] = np.inf
    assert not np.isfinite(case.run(qkv, length, level=level, parents=parents)[0][0]).all()


@pytest.mark.parametrize("window", [1, 64, 130, 700])
def test_a_windowed_token_has_the_same_bits_at_every_width(window):
    """300 tokens are streamed, few are cut into blocks from their window on: the same bits."""
    case = Case(8, heads=8, groups=2, size=64, window=window)
    qkv, length = case.rows(300), 900
    whole, keys, values = case.run(qkv, length, level=LEVELS[0], threads=2)
    case.key[:, length : length + 300], case.value[:, length : length + 300] = keys, values
    for start, width in ((0, 1), (1, 2), (8, 17), (57, 32), (200, 3), (299, 1)):
        for level in LEVELS:
            rows, _, _ = case.run(qkv[start : start + width], length + start, level=level)
            np.testing.assert_array_equal(rows, whole[start : start + width], err_msg=f"{start}, {width}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("size", "cache"), [*((size, "float32") for size in (16, 24, 64, 256)), (24, "int8"), (64, "int8")]
)
def test_a_token_has_the_same_bits_at_every_width_and_on_every_level(level, size, cache):
    """256 tokens after a long cache are streamed by tokens, 1 to 32 cut into blocks: the same bits."""
    case = Case(7, heads=8, groups=2, size=size, cache=cache)
    qkv, length = case.rows(256), 1200
    whole, keys, _ = case.run(qkv, length, level=LEVELS[0], threads=2)
    np.testing.assert_array_equal(case.run(qkv[:40], length, level=level)[0], whole[:40])
    for start, width in ((0, 1), (1, 2), (3, 5), (8, 17), (25, 32), (57, 3)):
        case.key[:, length : length + 256] = keys
        case.value[:, length : length + 256] = case.run(qkv, length, level=LEVELS[0])[2]
        rows, _, _ = case.run(qkv[start : start + width], length + start, level=level)
        np.testing.assert_array_equal(rows, whole[start : start + width], err_msg=f"{start}, {width}")


@pytest.mark.parametrize("level", LEVELS)
def test_one_kv_head_has_the_same_bits_where_streaming_it_would_leave_a_core_idle(level):
    """40 tokens are streamed in two tasks; 16 would be one, and are cut into blocks beyond the usual room."""
    case = Case(9, heads=16, groups=1, size=256)
    qkv, length = case.rows(40), 2100
    assert 16 * 16 * (2116 // 64) * (256 + 16) > 2**20
    whole = case.run(qkv, length, level=level, threads=2)[0]
    np.testing.assert_array_equal(case.run(qkv[:16], length, level=level, threads=2)[0], whole[:16])


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
        (
            lambda inputs: inputs.__setitem__(slice(8, 10), [np.ones(64, np.float32), np.ones(16, np.float32)]),
            "norms do not fit",
        ),
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
