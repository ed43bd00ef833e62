"""VerifyAttention over several sequences: its reference, and every sequence's bits as if it came alone."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.probes.tree_invariance import random_tree
from engines.tree import ancestor_mask, depths
from plugins.verify_attention import in_tiers, of_tiers, verify_attention_batch
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator
from tests.plugins.cpu.test_verify_attention import CACHES, STEPS, check_caches, random_cache, random_scales

pytestmark = needs_library
CAPACITY = 1088
SLOTS = 7
# New positions, committed positions; chunks of prompts beside single tokens.
WIDTHS = [1, 1, 1, 2, 5, 16, 32, 70]
LENGTHS = [0, 0, 1, 15, 63, 64, 65, 127, 128, 200, 700]


class Batch:
    """Random caches, tables, norms and sequences: (rows, cached, slot, parents or None) each."""

    def __init__(
        self,
        seed,
        sequences=None,
        *,
        heads=(4, 2),
        size=16,
        rotary=None,
        norms="",
        softcap=0.0,
        window=0,
        cache="float32",
    ):
        self.random = random = np.random.default_rng(seed)
        (self.heads, self.groups), self.size = heads, size
        self.operator, self.dtype = CACHES[cache]
        self.cache = cache
        self.key, self.value = (
            random_cache(random, (SLOTS, self.groups, CAPACITY, size), self.dtype) for _ in range(2)
        )
        self.scales = random_scales(random, self.groups, size, self.dtype)
        columns = (size if rotary is None else rotary) // 2
        angles = np.outer(np.arange(CAPACITY if columns else 1), 10000.0 ** -np.linspace(0, 1, columns))
        self.tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
        lengths = {"": (), "head": (size, size), "row": (self.heads * size, self.groups * size)}[norms]
        self.norms = [random.uniform(0.5, 1.5, length).astype(np.float32) for length in lengths] or [None, None]
        self.options = {"softcap": softcap, "epsilon": 1e-5}
        self.window = window
        self.sequences = self.mixture() if sequences is None else sequences
        self.widths = [rows for rows, *_ in self.sequences]
        self.starts = np.concatenate([[0], np.cumsum(self.widths, dtype=np.int64)])
        columns = (self.heads + 2 * self.groups) * size
        self.qkv = random.standard_normal((sum(self.widths), columns), np.float32)

    def mixture(self):
        random = self.random
        slots = random.permutation(SLOTS)[: random.integers(1, 7)]
        sequences = []
        for slot in slots:
            rows = int(random.choice(WIDTHS))
            parents = random_tree(random, rows)[0] if random.random() < 0.5 else None
            sequences.append((rows, int(random.choice(LENGTHS)), int(slot), parents))
        return sequences

    def positions(self, sequences):
        return np.concatenate(
            [
                length + (np.arange(rows) if parents is None else depths(np.asarray(parents)))
                for rows, length, _, parents in sequences
            ]
        )

    def mask(self, sequences):
        """No value where all are chains."""
        if all(parents is None for *_, parents in sequences):
            return np.empty(0, np.bool_)
        trees = [np.arange(-1, rows - 1) if parents is None else parents for rows, _, _, parents in sequences]
        return np.concatenate([ancestor_mask(np.asarray(parents)).reshape(-1) for parents in trees])

    def inputs(self, places=None):
        """Of all sequences, or of some of them."""
        places = range(len(self.sequences)) if places is None else places
        chosen = [self.sequences[place] for place in places]
        rows = [self.qkv[self.starts[place] : self.starts[place + 1]] for place in places]
        return [
            np.concatenate(rows)[None],
            self.key.copy(),
            self.value.copy(),
            np.array([length for _, length, _, _ in chosen]),
            self.positions(chosen)[None],
            *self.tables,
            self.mask(chosen),
            *self.norms,
            np.concatenate([[0], np.cumsum([rows for rows, *_ in chosen], dtype=np.int64)]),
            np.array([slot for _, _, slot, _ in chosen]),
            *self.scales,
        ]

    def run(self, places=None, *, level=LEVELS[0] if LEVELS else "", threads=1, in_place=True):
        """Context [R, H·D] and the whole caches."""
        return self.call(self.inputs(places), level=level, threads=threads, in_place=in_place)

    def run_alone(self, place, *, level):
        """A sequence in the form of one sequence, over a cache that is its own."""
        _, _, slot, parents = self.sequences[place]
        inputs = self.inputs([place])
        # No starts and no slots.
        inputs[10:12] = [None, None]
        inputs[1:3] = [cache[slot : slot + 1] for cache in inputs[1:3]]
        inputs[7] = None if parents is None else ancestor_mask(np.asarray(parents))[None]
        return self.call(inputs, level=level)

    def call(self, inputs, *, level, threads=1, in_place=True):
        tiers = "tier" in self.cache
        if tiers:
            inputs = [*inputs[:1], *(in_tiers(cache) for cache in inputs[1:3]), *inputs[3:]]
        context, key, value = run_operator(
            self.operator,
            inputs,
            {
                "num_heads": self.heads,
                "kv_num_heads": self.groups,
                "local_window_size": self.window,
                "scale": float(self.size**-0.5),
                **self.options,
            },
            level=level,
            outputs=3,
            in_place={1: 1, 2: 2} if in_place else None,
            threads=threads,
        )
        if tiers:
            key, value = of_tiers(key), of_tiers(value)
        return context[0], key, value

    def reference(self):
        qkv, key, value, lengths, positions, cos, sin, mask, q_norm, k_norm, starts, slots = self.inputs()[:12]
        key, value = key.astype(np.float32), value.astype(np.float32)
        context = verify_attention_batch(
            *(qkv[0], key, value, lengths, positions[0], cos, sin),
            sequence_starts=starts,
            cache_slots=slots,
            num_heads=self.heads,
            tree_mask=mask,
            q_norm=q_norm,
            k_norm=k_norm,
            window=self.window,
            cache_dtype=self.dtype,
            cache_scales=self.scales if self.dtype == np.int8 else None,
            upper_alone=self.cache == "upper tier",
            **self.options,
        )
        return context, key, value

    def check_alone(self, results, level):
        """Every sequence as in a call of its own, in both forms; every other byte of the caches as it was."""
        context, *caches = results
        untouched = [self.key.copy(), self.value.copy()]
        for place, (rows, length, slot, _) in enumerate(self.sequences):
            new, own = slice(length, length + rows), slice(self.starts[place], self.starts[place + 1])
            single, batch = self.run_alone(place, level=level), self.run([place], level=level)
            assert single[0].tobytes() == batch[0].tobytes() == context[own].tobytes(), place
            for of_one, of_batch, cache, kept in zip(single[1:], batch[1:], caches, untouched, strict=True):
                expected = of_one[0, :, new].tobytes()
                assert of_batch[slot, :, new].tobytes() == cache[slot, :, new].tobytes() == expected, place
                kept[slot, :, new] = of_one[0, :, new]
        for cache, kept in zip(caches, untouched, strict=True):
            assert cache.tobytes() == kept.tobytes()


@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None, max_examples=40, database=None, derandomize=True)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (8, 1)]),
    size=st.sampled_from([2, 16, 24, 64, 128, 256]),
    rotated=st.sampled_from(["all", "half", "nothing"]),
    norms=st.sampled_from(["", "head", "row"]),
    softcap=st.sampled_from([0.0, 5.0]),
    window=st.sampled_from([0, 1, 7, 64, 100]),
    cache=st.sampled_from(sorted(CACHES)),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_a_batch_equals_the_reference_and_its_sequences_alone(
    level, heads, size, rotated, norms, softcap, window, cache, threads, seed
):
    if "tier" in cache and size % 16:
        # Tiers hold sixteen values side by side.
        size = 16
    rotary = {"all": size, "half": size // 2 // 2 * 2, "nothing": 0}[rotated]
    batch = Batch(seed, heads=heads, size=size, rotary=rotary, norms=norms, softcap=softcap, window=window, cache=cache)
    results, expected = batch.run(level=level, threads=threads), batch.reference()
    # As for one sequence (test_verify_attention.py says why).
    np.testing.assert_allclose(results[0], expected[0], atol=2e-5 + STEPS[cache] / 4, rtol=2e-5)
    check_caches(results[1:], expected[1:], cache)
    batch.check_alone(results, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("first", ["long", "short"])
def test_what_has_no_room_is_streamed_with_the_same_bits(level, first):
    """Alone, each of these keeps its blocks; together, only the first ones of them do."""
    long = [(24, 1000 - 30 * slot, slot, random_tree(np.random.default_rng(slot), 24)[0]) for slot in range(5)]
    short = [(1, 900, 5, None), (64, 3, 6, None)]
    batch = Batch(4, long + short if first == "long" else short + long, heads=(8, 2), size=128)
    # Floats of a query's state in a block, times queries and blocks: the limit of a call is 2^20.
    needs = [8 * rows * -(-(rows + length) // 64) * (128 + 16) for rows, length, *_ in batch.sequences]
    assert max(needs) < 2**20 < sum(needs)
    batch.check_alone(batch.run(level=level, threads=2), level)


@pytest.mark.parametrize("level", LEVELS)
def test_a_sequence_that_is_streamed_alone_is_so_beside_others(level):
    batch = Batch(5, [(1, 500, 3, None), (256, 800, 0, None), (7, 0, 1, [-1, 0, 0, 1, 1, 4, 4])], heads=(8, 2), size=64)
    assert 8 * 256 * 17 * (64 + 16) > 2**20
    batch.check_alone(batch.run(level=level, threads=2), level)


def test_order_and_slots_do_not_matter():
    batch = Batch(6, [(3, 40, 2, [-1, 0, 0]), (1, 130, 5, None), (40, 64, 0, None), (2, 0, 3, [-1, -1])])
    context, key, _ = batch.run()
    for order in ([3, 1, 0, 2], [2, 0, 3, 1], [1, 3]):
        other, _, _ = batch.run(order)
        own = [slice(batch.starts[place], batch.starts[place + 1]) for place in order]
        np.testing.assert_array_equal(other, np.concatenate([context[rows] for rows in own]))
    moved = Batch(6, [(rows, length, (slot + 1) % SLOTS, parents) for rows, length, slot, parents in batch.sequences])
    moved.key, moved.value, moved.qkv = np.roll(batch.key, 1, 0), np.roll(batch.value, 1, 0), batch.qkv
    results = moved.run()
    np.testing.assert_array_equal(results[0], context)
    np.testing.assert_array_equal(np.roll(results[1], -1, 0), key)


def test_what_lies_in_other_slots_and_after_the_new_positions_does_not_matter():
    batch = Batch(7, [(3, 40, 2, [-1, 0, 0]), (1, 130, 5, None), (33, 20, 0, None)])
    before = batch.run()[0]
    junk = np.ones((SLOTS, CAPACITY), np.bool_)
    for _, length, slot, _ in batch.sequences:
        junk[slot, :length] = False
    for cache in (batch.key, batch.value):
        cache.swapaxes(1, 2)[junk] = np.nan
    np.testing.assert_array_equal(batch.run()[0], before)


def test_a_sequence_that_is_no_number_leaves_the_others_alone():
    batch = Batch(8, [(3, 40, 2, None), (4, 130, 5, None), (1, 64, 1, None)])
    before = batch.run()[0]
    batch.qkv[3:7] = np.nan
    after = batch.run()[0]
    np.testing.assert_array_equal(after[[0, 1, 2, 7]], before[[0, 1, 2, 7]])
    assert np.isnan(after[3:7]).all()


def test_a_mask_of_chains_is_no_mask():
    batch = Batch(9, [(3, 40, 2, None), (20, 130, 5, None)])
    inputs = batch.inputs()
    inputs[7] = np.concatenate([np.tril(np.ones((rows, rows), np.bool_)).reshape(-1) for rows in (3, 20)])
    for result, expected in zip(batch.call(inputs, level=LEVELS[0]), batch.run(), strict=True):
        assert result.tobytes() == expected.tobytes()
    inputs[7] = None
    np.testing.assert_array_equal(batch.call(inputs, level=LEVELS[0])[0], batch.run()[0])


def test_where_past_and_present_are_two_buffers_the_whole_cache_is_copied():
    batch = Batch(10, [(3, 40, 2, [-1, 0, 0]), (1, 130, 5, None)])
    for here, there in zip(batch.run(), batch.run(in_place=False), strict=True):
        assert here.tobytes() == there.tobytes()


def test_a_batch_of_nothing_is_nothing():
    batch = Batch(11, [(3, 40, 2, None)])
    inputs = batch.inputs()
    inputs[0], inputs[4] = inputs[0][:, :0], inputs[4][:, :0]
    inputs[3], inputs[10], inputs[11] = np.empty(0, np.int64), np.zeros(1, np.int64), np.empty(0, np.int64)
    context, key, _ = batch.call(inputs, level=LEVELS[0])
    assert context.shape == (0, 64)
    np.testing.assert_array_equal(key, batch.key)


def put(index, value):
    return lambda inputs: inputs.__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(10, None), "cache_slots came alone; sequence_starts and cache_slots go together"),
        (put(11, None), "sequence_starts came alone"),
        (put(10, np.array([0, 3])), "2 starts, 2 slots and 2 cache lengths came; one start more"),
        (put(10, np.array([[0, 3, 5]])), "3 starts, 2 slots and 2 cache lengths came; one start more"),
        (put(11, np.array([2])), "3 starts, 1 slots and 2 cache lengths came"),
        (put(3, np.array([1])), "3 starts, 2 slots and 1 cache lengths came"),
        (put(10, np.array([0, 3, 4])), "sequences from row 0 to 4 came; 0 to 5 were expected"),
        (put(10, np.array([1, 3, 5])), "sequences from row 1 to 5 came; 0 to 5 were expected"),
        (put(10, np.array([0, 5, 5])), "sequence 1 starts at row 5, the next at 5; a later one was expected"),
        (put(10, np.array([0, 7, 5])), "sequence 1 starts at row 7, the next at 5"),
        (put(10, np.array([0, -1, 5])), "sequence 0 starts at row 0, the next at -1"),
        (put(11, np.array([0, SLOTS])), "cache slot 7 came; 0 to 6 expected"),
        (put(11, np.array([-1, 0])), "cache slot -1 came; 0 to 6 expected"),
        (put(11, np.array([4, 4])), "cache slot 4 came for two sequences"),
        (put(3, np.array([0, CAPACITY - 1])), "2 tokens after 1087 do not fit a cache of 1088"),
        (put(3, np.array([-1, 0])), "3 tokens after -1 do not fit"),
        (put(4, np.array([[0, 1, 2, 0, CAPACITY]])), "position 1088 came; 0 to 1087 expected"),
        (put(4, np.array([[0, 1, 2, 0]])), "4 positions came; 5 were expected"),
        (put(7, np.ones(25, np.bool_)), "a tree mask of 25 values on 1 axes came; 13 or 0 on one were expected"),
        (put(7, np.ones((1, 13), np.bool_)), "a tree mask of 13 values on 2 axes came"),
        (put(7, np.ones(13, np.bool_)), "row 0 of the tree mask sees a later row"),
        (put(7, np.array([1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0], np.bool_)), "row 4 of the tree mask does not see"),
        (put(0, np.zeros((2, 5, 128), np.float32)), "a batch of 2 came; 1 was expected"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    batch = Batch(12, [(3, 40, 2, None), (2, 130, 5, None)])
    inputs = batch.inputs()
    change(inputs)
    with pytest.raises(Exception, match=re.escape(message)):
        batch.call(inputs, level=LEVELS[0], in_place=False)


def test_one_sequence_without_starts_has_one_cache():
    batch = Batch(13, [(3, 40, 2, None)])
    with pytest.raises(Exception, match="a batch of 7 came; 1 was expected"):
        batch.call([*batch.inputs()[:7], None, None, None], level=LEVELS[0], in_place=False)
