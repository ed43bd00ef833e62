"""The kernels of the CUDA back end in Triton's interpreter, against their references (see interpreted.py)."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines.tree import ancestor_mask, depths
from plugins.gpu.catalog import kernel_of
from plugins.gpu.interpreter import interpret
from plugins.gpu.packing import (
    TILE_INPUTS,
    TILE_OUTPUTS,
    pack_block_scales,
    pack_blocks,
    pack_channels,
    pack_nibbles,
    pack_weight,
    tiles_of,
)
from plugins.gpu.variants import (
    BLOCKS,
    FORMS,
    GATES,
    MERGED,
    PER_TOKEN,
    TILE_TOKENS,
    AttendCache,
    AttendPath,
    BlockLinear,
    GatherRows,
    Likelihoods,
    LmHead,
    MergeLikeliest,
    NormAdd,
    NormQuantize,
    PlaceRows,
    RotateAppend,
    W8A8Linear,
    num_splits,
    power_of_2,
    tile_tokens,
)
from plugins.verify_attention import verify_attention as attention_reference
from plugins.w8a8_linear import quantize_rows, quantize_wide, rms_norm, w4a16_block_linear, w8a8_block_linear
from plugins.w8a8_linear import w8a8_linear as linear_reference
from quasar.numerics import BLOCK

CHECKED = {"deadline": None, "database": None, "derandomize": True}
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NOTHING = torch.zeros(1)


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def run(kernel, grid, **arguments):
    assert list(arguments) == list(kernel.signature)
    interpret(kernel, grid, [*arguments.values()])


def quantized(x, weight=None, epsilon=0.0, *, form=PER_TOKEN):
    """The kernel's integers or floats, padded to whole tiles, and amax: of tokens, or of their blocks."""
    columns = x.shape[1]
    stride = tiles_of(columns, TILE_INPUTS) * TILE_INPUTS
    q, a = torch.full((len(x), stride), 99, dtype=torch.int8), torch.full((len(x),), -1.0)
    if FORMS[form].in_blocks:
        a = torch.full((len(x), stride // BLOCK), -1.0)
    if FORMS[form].planes:
        q = torch.full((len(x), 2, stride), 99, dtype=torch.int8)
    run(
        kernel_of(NormQuantize.of(columns, norm=weight is not None, form=form)),
        (len(x),),
        x=tensor(x),
        weight=NOTHING if weight is None else tensor(weight),
        q=q,
        a=a,
        columns=columns,
        stride=stride,
        epsilon=epsilon,
    )
    assert not q[..., columns:].any()
    return q, a


def rows_with_extremes(random, tokens, columns, exponent):
    x = (random.standard_normal((tokens, columns)) * 10.0**exponent).astype(np.float32)
    x[random.random(x.shape) < 0.1] = 0
    # Ties: multiples of half a step of a row whose amax is 127.
    x[0] = np.clip(np.round(x[0] / 10.0**exponent * 60) / 2, -126, 126)
    x[0, 0] = 127
    return x


@settings(max_examples=40, **CHECKED)
@given(
    tokens=st.integers(1, 4),
    columns=st.sampled_from([1, 3, 64, 100, 127, 128, 129, 576, 1024, 1536]),
    exponent=st.integers(-6, 4),
    seed=st.integers(0, 2**31),
)
def test_quantize_is_the_reference(tokens, columns, exponent, seed):
    x = rows_with_extremes(np.random.default_rng(seed), tokens, columns, exponent)
    q, a = quantized(x)
    expected_q, expected_a = quantize_rows(x)
    np.testing.assert_array_equal(q[:, :columns], expected_q)
    np.testing.assert_array_equal(a, expected_a)


def quantized_in_blocks(tokens, columns, exponent, seed, *, form):
    """What the kernel makes of rows, one with a NaN where there is more than a block, and their blocks, padded."""
    x = rows_with_extremes(np.random.default_rng(seed), tokens, columns, exponent)
    if columns > 64:
        x[0, 40] = np.nan
    q, a = quantized(x, form=form)
    padded = np.zeros((tokens, a.shape[1] * BLOCK), np.float32)
    padded[:, :columns] = x
    return q, a, padded.reshape(tokens, -1, BLOCK)


@settings(max_examples=30, **CHECKED)
@given(
    tokens=st.integers(1, 3),
    columns=st.sampled_from([1, 31, 64, 100, 129, 576, 1536]),
    exponent=st.integers(-6, 4),
    seed=st.integers(0, 2**31),
)
def test_quantize_in_blocks_is_the_reference(tokens, columns, exponent, seed):
    q, a, blocks = quantized_in_blocks(tokens, columns, exponent, seed, form=BLOCKS)
    expected_q, expected_a = quantize_rows(blocks)
    np.testing.assert_array_equal(q.numpy().reshape(expected_q.shape), expected_q)
    np.testing.assert_array_equal(a, expected_a)


@settings(max_examples=30, **CHECKED)
@given(
    tokens=st.integers(1, 3),
    columns=st.sampled_from([1, 31, 64, 100, 129, 576]),
    exponent=st.integers(-6, 30),
    seed=st.integers(0, 2**31),
)
def test_quantize_to_two_planes_is_the_reference(tokens, columns, exponent, seed):
    q, a, blocks = quantized_in_blocks(tokens, columns, exponent, seed, form=PLANES)
    expected_q, expected_a = quantize_wide(blocks)
    planes = q.numpy().astype(np.int32).reshape(tokens, 2, -1, BLOCK)
    np.testing.assert_array_equal(256 * planes[:, 0] + planes[:, 1], expected_q)
    np.testing.assert_array_equal(a, expected_a)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_says_so(bad):
    x = np.ones((3, 200), np.float32)
    x[1, 7] = bad
    q, a = quantized(x)
    expected_q, expected_a = quantize_rows(x)
    np.testing.assert_array_equal(q[:, :200], expected_q)
    np.testing.assert_array_equal(a, expected_a)


@settings(max_examples=30, **CHECKED)
@given(
    tokens=st.integers(1, 4),
    columns=st.sampled_from([16, 100, 576, 1024]),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_norm_and_quantization(tokens, columns, exponent, seed):
    """The norm is float32 here and partly float64 in the reference: some units in the last place of `a`, and an integer
    that was near a tie may go to the other side."""
    random = np.random.default_rng(seed)
    x = (random.standard_normal((tokens, columns)) * 10.0**exponent).astype(np.float32)
    weight = random.standard_normal(columns).astype(np.float32)
    q, a = quantized(x, weight, 1e-5)
    expected_q, expected_a = quantize_rows(rms_norm(x, weight, 1e-5))
    np.testing.assert_allclose(a, expected_a, rtol=1e-6)
    off = np.abs(q[:, :columns].numpy().astype(np.int32) - expected_q)
    assert off.max() <= 1
    assert np.count_nonzero(off) <= 1 + off.size // 200


def linear(x, values, scale, *, splits, tokens_of_tile, gate="", bias=None, residual=None):
    q, a = quantized(x)
    inputs = tiles_of(values.shape[1], TILE_INPUTS)
    gated = bool(gate)
    outputs = len(values) // 2 if gated else len(values)
    parts = 2 if gated else 1
    tiles = tiles_of(outputs, TILE_OUTPUTS)
    token_tiles = tiles_of(len(x), tokens_of_tile)
    y = torch.full((len(x), outputs), np.nan)
    sums = torch.zeros(token_tiles * tiles * parts * TILE_OUTPUTS * tokens_of_tile, dtype=torch.int32)
    arrived = torch.zeros(token_tiles * tiles, dtype=torch.int32)
    run(
        kernel_of(W8A8Linear(tokens=tokens_of_tile, bias=bias is not None, residual=residual is not None, gate=gate)),
        (token_tiles, tiles, splits),
        q=q,
        a=a,
        weight=tensor(pack_weight(values, gated=gated)),
        scale=tensor(pack_channels(scale, gated=gated)),
        bias=NOTHING if bias is None else tensor(pack_channels(bias, gated=gated)),
        residual=NOTHING if residual is None else tensor(residual),
        y=y,
        sums=sums,
        arrived=arrived,
        tokens=len(x),
        outputs=outputs,
        input_tiles=inputs,
        tiles_per_split=tiles_of(inputs, splits),
        splits=splits,
    )
    # The next pass finds them as this one did.
    assert not sums.any()
    assert not arrived.any()
    return y.numpy()


@settings(max_examples=25, **CHECKED)
@given(
    tokens=st.integers(1, 40),
    outputs=st.sampled_from([2, 64, 66, 130]),
    inputs=st.sampled_from([5, 128, 300]),
    tokens_of_tile=st.sampled_from(TILE_TOKENS),
    splits=st.sampled_from([1, 2, 3]),
    gate=st.sampled_from(GATES),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(40, 130, 300, 16, 3, "silu", True, False, 0)
@example(40, 130, 300, 32, 2, "gelu_tanh", True, False, 0)
@example(1, 66, 300, 16, 2, "", True, True, 1)
def test_linear(tokens, outputs, inputs, tokens_of_tile, splits, gate, has_bias, has_residual, seed):
    random = np.random.default_rng(seed)
    x = rows_with_extremes(random, tokens, inputs, 0)
    values = random.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    values[0], x[-1] = 127, 5.0
    scale = random.uniform(1e-4, 1e-2, outputs).astype(np.float32)
    finished = outputs // 2 if gate else outputs
    bias = random.standard_normal(outputs).astype(np.float32) if has_bias else None
    residual = random.standard_normal((tokens, finished)).astype(np.float32) if has_residual and not gate else None
    parts = {"bias": bias, "residual": residual}
    y = linear(x, values, scale, splits=splits, tokens_of_tile=tokens_of_tile, gate=gate, **parts)
    expected = linear_reference(x, values, scale, gate=GATES.index(gate), **parts)
    if gate:
        # e^x of the interpreter and of the reference differ in the last place; of gelu, what e is raised to is rounded
        # in float32: where e^x matters, by less than 1e-6 of an up.
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * max(1, np.abs(y).max()))
    else:
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("gate", GATES[1:])
def test_a_token_is_the_same_in_any_company(gate):
    random = np.random.default_rng(5)
    x = random.standard_normal((33, 300)).astype(np.float32)
    values = random.integers(-127, 128, (128, 300)).astype(np.int8)
    scale = random.uniform(1e-4, 1e-2, 128).astype(np.float32)
    alone = linear(x[20:21], values, scale, splits=1, tokens_of_tile=16, gate=gate)
    for tile in TILE_TOKENS:
        together = linear(x, values, scale, splits=3, tokens_of_tile=tile, gate=gate)
        np.testing.assert_array_equal(together[20], alone[0])


IN_BLOCKS = [name for name, form in FORMS.items() if form.in_blocks]
PLANES = "nibbles_planes"


def block_weights(random, form, outputs, inputs):
    """Integers of a form, and their scales [outputs, blocks] in its type, and offsets or None."""
    blocks = tiles_of(inputs, BLOCK)
    low, high, kind = (-8, 8, np.float16) if FORMS[form].nibbles else (-127, 128, np.float32)
    values = random.integers(low, high, (outputs, inputs)).astype(np.int8)
    scale = random.uniform(1e-3, 1e-2, (outputs, blocks)).astype(kind)
    if not FORMS[form].offsets:
        return values, scale, None
    return values + np.int8(8), scale, random.uniform(-1e-1, 0, (outputs, blocks)).astype(kind)


def packed_blocks(form, values, scale, offset, *, gated=False):
    """Weight and scales as the kernels read them."""
    packed = pack_blocks(values, gated=gated)
    if FORMS[form].nibbles:
        packed = pack_nibbles(values if offset is None else values - np.int8(8), gated=gated)
    scales = pack_block_scales(scale, gated=gated)
    if offset is not None:
        scales = np.stack([scales, pack_block_scales(offset, gated=gated)], axis=2)
    return {"weight": tensor(packed), "scale": tensor(scales)}


def block_reference(x, values, scale, offset, *, form, **options):
    """Inputs beyond the last whole block are zeros."""
    more = -x.shape[1] % BLOCK
    x, values = np.pad(x, ((0, 0), (0, more))), np.pad(values, ((0, 0), (0, more)))
    reference = w4a16_block_linear if FORMS[form].planes else w8a8_block_linear
    floats = None if offset is None else offset.astype(np.float32)
    return reference(x, values, scale.astype(np.float32), offset=floats, **options)


def block_linear(
    x, values, scale, offset, *, form, parts, tokens_of_tile, splits=None, gate="", bias=None, residual=None
):
    """`splits` None: a program for every part."""
    q, a = quantized(x, form=form)
    inputs, splits = tiles_of(values.shape[1], TILE_INPUTS), parts if splits is None else splits
    gated = bool(gate)
    outputs = len(values) // 2 if gated else len(values)
    tiles, token_tiles = tiles_of(outputs, TILE_OUTPUTS), tiles_of(len(x), tokens_of_tile)
    y = torch.full((len(x), outputs), np.nan)
    partials = torch.full((token_tiles * tiles * splits * 2 * TILE_OUTPUTS * tokens_of_tile,), np.nan)
    arrived = torch.zeros(token_tiles * tiles, dtype=torch.int32)
    has = {"bias": bias is not None, "residual": residual is not None}
    run(
        kernel_of(BlockLinear(form=form, tokens=tokens_of_tile, gate=gate, **has)),
        (token_tiles, tiles, splits),
        q=q,
        a=a,
        **packed_blocks(form, values, scale, offset, gated=gated),
        bias=NOTHING if bias is None else tensor(pack_channels(bias, gated=gated)),
        residual=NOTHING if residual is None else tensor(residual),
        y=y,
        partials=partials,
        arrived=arrived,
        tokens=len(x),
        outputs=outputs,
        input_tiles=inputs,
        tiles_per_part=tiles_of(inputs, parts),
        parts=parts,
        splits=splits,
    )
    # The next pass finds it as this one did.
    assert not arrived.any()
    return y.numpy()


@settings(max_examples=25, **CHECKED)
@given(
    form=st.sampled_from(IN_BLOCKS),
    tokens=st.integers(1, 20),
    outputs=st.sampled_from([2, 64, 66]),
    inputs=st.sampled_from([32, 128, 288]),
    gate=st.sampled_from(GATES),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example("nibbles", 20, 66, 288, "silu", True, False, 0)
@example("nibbles_offsets", 20, 66, 288, "silu", True, False, 0)
@example("nibbles_planes", 20, 66, 288, "", True, True, 0)
@example("nibbles_offsets_planes", 3, 66, 288, "gelu_tanh", True, False, 0)
@example(BLOCKS, 1, 66, 288, "", True, True, 1)
def test_linear_in_blocks(form, tokens, outputs, inputs, gate, has_bias, has_residual, seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, inputs)).astype(np.float32)
    weights = block_weights(random, form, outputs, inputs)
    finished = outputs // 2 if gate else outputs
    bias = random.standard_normal(outputs).astype(np.float32) if has_bias else None
    residual = random.standard_normal((tokens, finished)).astype(np.float32) if has_residual and not gate else None
    optional = {"bias": bias, "residual": residual}
    parts = min(2, tiles_of(inputs, TILE_INPUTS))
    tile = FORMS[form].tile_tokens[0]
    y = block_linear(x, *weights, form=form, parts=parts, tokens_of_tile=tile, gate=gate, **optional)
    expected = block_reference(x, *weights, form=form, gate=GATES.index(gate), **optional)
    # Blocks are added in parts, and products rounded before they are added.
    magnitudes = [None if one is None else np.abs(one) for one in weights]
    size = np.abs(expected) + block_reference(np.abs(x), *magnitudes, form=form, gate=GATES.index(gate))
    np.testing.assert_array_less(np.abs(y - expected), 4e-6 * size + 1e-6)


@pytest.mark.parametrize("form", IN_BLOCKS)
def test_a_token_in_blocks_is_the_same_in_any_company(form):
    """Alone in three programs, with others, and in a prompt's one program."""
    random = np.random.default_rng(5)
    x = random.standard_normal((20, 700)).astype(np.float32)
    weights = block_weights(random, form, 128, 704)
    x = np.pad(x, ((0, 0), (0, 4)))
    tiles = FORMS[form].tile_tokens
    options = {"form": form, "parts": 3, "gate": "silu"}
    alone = block_linear(x[7:8], *weights, tokens_of_tile=tiles[0], **options)
    for tile, splits in ((tiles[-1], 3), (tiles[0], 1), (tiles[-1], 1)):
        together = block_linear(x, *weights, tokens_of_tile=tile, splits=splits, **options)
        np.testing.assert_array_equal(together[7], alone[0])


@pytest.mark.parametrize("columns", [100, 576, 1024])
def test_norm_and_sum(columns):
    """The norm sums in float32 here and in float64 in the reference: some units in the last place of its values."""
    random = np.random.default_rng(columns)
    x, residual = (random.standard_normal((3, columns)).astype(np.float32) for _ in range(2))
    x[1] *= 1000
    weight = random.standard_normal(columns).astype(np.float32)
    y = torch.full((3, columns), np.nan)
    run(
        kernel_of(NormAdd.of(columns)),
        (3,),
        x=tensor(x),
        weight=tensor(weight),
        residual=tensor(residual),
        y=y,
        columns=columns,
        epsilon=1e-5,
    )
    normed = rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(y, residual + normed, rtol=1e-6, atol=1e-6 * np.abs(normed).max())


class Layer:
    """Random q/k/v of a pass and a cache, on the kernel's side and on the reference's."""

    def __init__(self, seed, *, heads, groups, size, rotary, cache_type, norm=False, row=False, capacity=640):
        self.random = np.random.default_rng(seed)
        self.heads, self.groups, self.size, self.rotary = heads, groups, size, rotary
        self.capacity, self.type, self.norm = capacity, cache_type, norm
        angles = self.random.uniform(0, 6, (capacity, rotary // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        sizes = (heads * size, groups * size) if row else (size, size)
        self.row = power_of_2(sizes[0]) if row else 0
        self.weights = [self.random.uniform(0.5, 2, one).astype(np.float32) for one in sizes] if norm else None
        shape = (2, groups, capacity, size)
        self.scales = []
        if cache_type == "int8":
            # Values of channels reach from 1 to 8, a few of what is appended further than its channel's largest.
            self.scales = [np.exp2(self.random.uniform(0, 3, (groups, size))).astype(np.float32) / 127 for _ in "kv"]
            self.keys, self.values = (tensor(self.random.integers(-127, 128, shape, dtype=np.int8)) for _ in "kv")
        else:
            self.keys, self.values = (tensor(self.random.standard_normal(shape)).to(TYPES[cache_type]) for _ in "kv")

    def qkv(self, tokens):
        return self.random.standard_normal((tokens, (self.heads + 2 * self.groups) * self.size)).astype(np.float32)

    def attend(self, qkv, cached, parents=None, *, slot=1, reach=32, softcap=0.0, window=0, first=0, writes=True):
        tokens = len(qkv)
        offsets = np.arange(tokens) if parents is None else depths(np.array(parents))
        positions = tensor((cached + offsets).astype(np.int32))
        destinations = tensor((cached + np.arange(tokens) if writes else np.full(tokens, -1)).astype(np.int32))
        committed, ancestors = positions + 1, np.zeros((tokens, reach), np.int32)
        if parents is not None:
            committed = torch.full((tokens,), cached, dtype=torch.int32)
            for row, seen in enumerate(ancestor_mask(np.array(parents))):
                path = np.flatnonzero(seen)
                ancestors[row, : len(path)] = path
        slots = torch.full((tokens,), slot, dtype=torch.int32)
        queries = torch.zeros((tokens, self.heads, self.size))
        norms = [NOTHING] * 2 if self.weights is None else [tensor(one) for one in self.weights]
        scales = dict(zip(("key_scale", "value_scale"), map(tensor, self.scales), strict=False))
        key_scale = {name: scale for name, scale in scales.items() if name == "key_scale"}
        run(
            kernel_of(
                RotateAppend(
                    head_size=self.size, rotary=self.rotary, cache_type=self.type, norm=self.norm, row=self.row
                )
            ),
            (tokens, self.heads + 2 * self.groups),
            qkv=tensor(qkv),
            cos=tensor(self.cos),
            sin=tensor(self.sin),
            q_norm=norms[0],
            k_norm=norms[1],
            positions=positions,
            destinations=destinations,
            slots=slots,
            queries=queries,
            keys=self.keys,
            values=self.values,
            heads=self.heads,
            kv_heads=self.groups,
            capacity=self.capacity,
            epsilon=1e-5,
            **scales,
        )
        shape = {"group": self.heads // self.groups, "head_size": self.size, "reach": reach, "cache_type": self.type}
        flags = {"softcap": bool(softcap), "window": bool(window)}
        over_cache, over_path = (kernel_of(kind(**shape, **flags)) for kind in (AttendCache, AttendPath))
        splits = max(1, num_splits(cached + tokens - 1, reach))
        # What nothing writes must not be read.
        partial = torch.full((tokens, self.heads, splits, self.size), np.nan)
        stats = torch.full((tokens, self.heads, splits, 2), np.nan)
        context = torch.full((tokens, self.heads * self.size), np.nan)
        caches = {"queries": queries, "keys": self.keys, "values": self.values, "positions": positions}
        scratch = {"partial": partial, "partial_stats": stats}
        sizes = {"heads": self.heads, "kv_heads": self.groups, "capacity": self.capacity, "most_splits": splits}
        last = {"scale": self.size**-0.5, "softcap": softcap, "window": window}
        tile = tile_tokens(self.heads // self.groups, self.size)
        starts = range(first, tokens, tile)
        # The table of the tokens before, and one tile more, in which there is nothing.
        tiles = [(99, 99)] * first + [(start, min(tile, tokens - start)) for start in starts] + [(0, 0)]
        run(
            over_cache,
            (self.groups, len(starts) + 1, splits),
            **caches,
            slots=slots,
            tiles=tensor(np.array(tiles, np.int32)),
            **scratch,
            first_token=first,
            **sizes,
            **last,
            **key_scale,
        )
        run(
            over_path,
            (tokens - first, self.groups),
            **caches,
            committed=committed,
            ancestors=tensor(ancestors),
            slots=slots,
            **scratch,
            context=context,
            first_token=first,
            **sizes,
            **last,
            **scales,
        )
        return context.numpy()[first:]

    def expected(self, qkv, cached, parents=None, *, slot=1, **options):
        keys, values = (cache[slot].float().numpy().copy() for cache in (self.keys, self.values))
        offsets = np.arange(len(qkv)) if parents is None else depths(np.array(parents))
        # numpy has no bfloat16: the kernel's own keys and values are compared apart.
        return attention_reference(
            qkv,
            keys,
            values,
            cached,
            cached + offsets,
            self.cos,
            self.sin,
            num_heads=self.heads,
            tree_mask=None if parents is None else ancestor_mask(np.array(parents)),
            q_norm=self.weights[0] if self.weights else None,
            k_norm=self.weights[1] if self.weights else None,
            epsilon=1e-5,
            cache_dtype=np.dtype(np.float16 if self.type == "float16" else np.float32),
            cache_scales=tuple(self.scales) or None,
            **options,
        ), (keys, values)


TREE = [-1, 0, 0, 1, 2, 2, 4, 3]


@pytest.mark.parametrize("cache_type", TYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "rotary", "cached", "tokens"),
    [
        (4, 2, 16, 16, 0, 1),
        (3, 1, 24, 16, 63, 2),
        (9, 3, 64, 64, 200, 5),
        (5, 5, 16, 8, 0, 18),
        (7, 1, 32, 32, 353, 1),
        (4, 2, 16, 16, 590, 33),
    ],
)
def test_attention(heads, groups, size, rotary, cached, tokens, cache_type):
    """Queries and weights are rounded to the cache's type, 11 bits or 8, before products: values near 1 are off by so
    much, and the sums of weighted values by less."""
    norm, atol = cached > 100, {"float16": 4e-3, "bfloat16": 3e-2}[cache_type]
    layer = Layer(cached, heads=heads, groups=groups, size=size, rotary=rotary, cache_type=cache_type, norm=norm)
    qkv = layer.qkv(tokens)
    expected, _ = layer.expected(qkv, cached)
    np.testing.assert_allclose(layer.attend(qkv, cached), expected, atol=atol)


@pytest.mark.parametrize("parents", [None, TREE])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "rotary", "cached", "options"),
    [
        (4, 2, 16, 16, 0, {}),
        (3, 1, 24, 8, 63, {}),
        (9, 3, 64, 64, 353, {}),
        (2, 1, 128, 128, 590, {"softcap": 10.0, "window": 300}),
    ],
)
def test_attention_over_an_int8_cache(heads, groups, size, rotary, cached, options, parents):
    """Integers are exact in float16, and queries and weights have 22 bits: what is left is float32's rounding."""
    norm = cached > 100
    layer = Layer(cached, heads=heads, groups=groups, size=size, rotary=rotary, cache_type="int8", norm=norm)
    qkv = layer.qkv(len(TREE))
    expected, (keys, values) = layer.expected(qkv, cached, parents, **options)
    np.testing.assert_allclose(layer.attend(qkv, cached, parents, **options), expected, atol=2e-5)
    # Where float32 and the reference's norm lie at both sides of a step's middle, integers differ by one.
    assert np.abs(layer.keys[1].float().numpy() - keys).max() <= (1 if norm else 0)
    np.testing.assert_array_equal(layer.values[1].float(), values)
    new = layer.values[1][:, cached : cached + len(qkv)].abs()
    assert new.max() == 127


@pytest.mark.parametrize(("softcap", "window"), [(20.0, 0), (0.0, 40), (5.0, 300)])
def test_soft_caps_and_windows(softcap, window):
    layer = Layer(3, heads=4, groups=2, size=32, rotary=32, cache_type="float16")
    for cached in (10, 380):
        qkv = layer.qkv(6)
        options = {"softcap": softcap, "window": window}
        expected, _ = layer.expected(qkv, cached, **options)
        np.testing.assert_allclose(layer.attend(qkv, cached, **options), expected, atol=4e-3)


@pytest.mark.parametrize("window", [1, 33, 150, 257])
def test_what_lies_before_a_window_is_not_read(window):
    """Of every place of a window's start among blocks and splits: a chain with wide heads, and paths of a tree.

    A window of one position gives the token's own value. Elsewhere the tolerance is that of `test_attention`.
    """
    layer = Layer(window, heads=2, groups=1, size=16, rotary=16, cache_type="float16")
    for cached, parents in ((575, None), (575, TREE), (320, TREE)):
        qkv = layer.qkv(len(TREE))
        options = {"softcap": 10.0, "window": window}
        expected, _ = layer.expected(qkv, cached, parents, **options)
        np.testing.assert_allclose(layer.attend(qkv, cached, parents, **options), expected, atol=4e-3)
        oldest = cached - window
        if oldest > 0:
            # Nothing reads what lies before.
            layer.values[:, :, : oldest // 64 * 64] = np.nan
            layer.keys[:, :, : oldest // 64 * 64] = np.nan
            assert np.isfinite(layer.attend(qkv, cached, parents, **options)).all()
            layer = Layer(window, heads=2, groups=1, size=16, rotary=16, cache_type="float16")


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 1, 256), (3, 3, 96), (2, 1, 16)])
def test_norms_over_all_heads_in_a_layer_that_does_not_rotate(heads, groups, size):
    """Wide heads, heads of no power of two, and one kv head whose row is a head; the tolerance of `test_attention`."""
    layer = Layer(size, heads=heads, groups=groups, size=size, rotary=0, cache_type="float16", norm=True, row=True)
    qkv = layer.qkv(5)
    expected, (keys, values) = layer.expected(qkv, 70)
    np.testing.assert_allclose(layer.attend(qkv, 70), expected, atol=4e-3)
    # The reference's norm sums in float64: the last of 11 bits may differ.
    np.testing.assert_allclose(layer.keys[1].float(), keys, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(layer.values[1].float(), values)


def test_keys_and_values_are_the_references():
    layer = Layer(3, heads=4, groups=2, size=32, rotary=16, cache_type="float16", norm=True)
    qkv = layer.qkv(6)
    _, (keys, values) = layer.expected(qkv, 20)
    before = layer.keys[0].clone()
    layer.attend(qkv, 20)
    # The reference's norm sums in float64: the last of 11 bits may differ.
    np.testing.assert_allclose(layer.keys[1].float(), keys, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(layer.values[1].float(), values)
    assert torch.equal(layer.keys[0], before)


def test_a_token_without_a_destination_is_written_nowhere():
    layer = Layer(3, heads=4, groups=2, size=32, rotary=16, cache_type="float16", norm=True)
    qkv, before = layer.qkv(3), (layer.keys.clone(), layer.values.clone())
    assert np.isfinite(layer.attend(qkv, 20, slot=0, writes=False)).all()
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])
    layer.attend(qkv, 20, slot=0)
    assert not torch.equal(layer.keys, before[0])


@pytest.mark.parametrize(
    ("cached", "heads", "groups", "cache_type"),
    [
        *((cached, 4, 2, "float16") for cached in (0, 62, 130, 353)),
        *((cached, 3, 1, "float16") for cached in (1, 95, 290)),
        *((cached, 3, 1, "int8") for cached in (95, 290)),
    ],
)
def test_a_tokens_bits_depend_on_its_path_alone(cached, heads, groups, cache_type):
    """The tokens of a path: one by one, as a chain, as a path of a tree, and with the rest of a wide pass before it."""
    layer = Layer(cached, heads=heads, groups=groups, size=16, rotary=16, cache_type=cache_type)
    keys, values = layer.keys.clone(), layer.values.clone()
    qkv = layer.qkv(len(TREE))
    path = [0, 2, 4, 6]

    def run_from(cached, rows, parents=None):
        return layer.attend(qkv[rows], cached, parents)

    one_by_one = np.concatenate([run_from(cached + depth, [row]) for depth, row in enumerate(path)])
    layer.keys, layer.values = keys.clone(), values.clone()
    np.testing.assert_array_equal(run_from(cached, path), one_by_one)
    layer.keys, layer.values = keys.clone(), values.clone()
    np.testing.assert_array_equal(run_from(cached, list(range(len(TREE))), TREE)[path], one_by_one)


@pytest.mark.parametrize(("columns", "first", "width"), [(100, 3, 203), (576, 576, 1152), (64, 0, 64)])
@pytest.mark.parametrize("is_normed", [False, True])
def test_place_rows(columns, first, width, is_normed):
    """Other columns stay; the norm as in `test_norm_and_sum`."""
    random = np.random.default_rng(columns)
    x = random.standard_normal((3, columns)).astype(np.float32)
    x[1] *= 1000
    weight = random.standard_normal(columns).astype(np.float32)
    y = torch.full((3, width), np.nan)
    run(
        kernel_of(PlaceRows.of(columns, first, width, norm=is_normed)),
        (3,),
        x=tensor(x),
        weight=tensor(weight) if is_normed else NOTHING,
        y=y,
        columns=columns,
        first=first,
        width=width,
        epsilon=1e-5,
    )
    placed = y[:, first : first + columns].numpy()
    if is_normed:
        np.testing.assert_allclose(placed, rms_norm(x, weight, 1e-5), rtol=2e-6)
    else:
        np.testing.assert_array_equal(placed, x)
    assert torch.isnan(y).sum() == 3 * (width - columns)


@pytest.mark.parametrize(("vocabulary", "top_k"), [(160, 8), (1024, 8), (2500, 3), (5, 5)])
def test_likelihoods(vocabulary, top_k):
    """Sums of e^x are in another order than in the reference: some units in the last place of the logarithms."""
    random = np.random.default_rng(vocabulary)
    logits = (6 * random.standard_normal((3, vocabulary))).astype(np.float32)
    tokens = likeliest(logits)[:, :top_k].copy()
    expected = torch.from_numpy(logits).double().log_softmax(-1).gather(1, torch.from_numpy(tokens))
    # A row without a likeliest token has logits that are no numbers.
    tokens[2] = -1
    y = torch.zeros((3, top_k))
    given = {"logits": tensor(logits), "tokens": tensor(tokens), "y": y, "vocabulary": vocabulary}
    run(kernel_of(Likelihoods(likeliest=top_k)), (3,), **given)
    np.testing.assert_allclose(y[:2], expected[:2], rtol=2e-6, atol=2e-6)
    assert torch.isnan(y[2]).all()


def test_gather_rows():
    random = np.random.default_rng(0)
    table = random.standard_normal((50, 1100)).astype(np.float32)
    indices = np.array([3, 0, 49, 3], np.int32)
    for name, kind in (*TYPES.items(), ("float32", torch.float32)):
        stored = tensor(table).to(kind)
        rows = stored[indices.astype(np.int64)].float()
        for scale in (1.0, float(np.float32(24.1))):
            y = torch.full((4, 1100), np.nan)
            given = {"table": stored, "indices": tensor(indices), "y": y, "columns": 1100, "scale": scale}
            run(kernel_of(GatherRows(table_type=name)), (4, 2), **given)
            assert torch.equal(y, rows * torch.tensor(scale))


def likeliest(logits):
    """Tokens int64 [T, V], likeliest first, ties by lower id."""
    return np.argsort(-logits, axis=1, kind="stable")


@pytest.mark.parametrize(("vocabulary", "tokens"), [(64, 18), (500, 1), (1000, 2)])
@pytest.mark.parametrize(
    ("top_k", "softcap", "form"),
    [(0, 0.0, ""), (8, 0.0, ""), (8, 15.0, ""), *((8, 0.0, form) for form in IN_BLOCKS)],
)
def test_head(vocabulary, tokens, top_k, softcap, form):
    random = np.random.default_rng(vocabulary)
    x = random.standard_normal((tokens, 130)).astype(np.float32)
    x[0] = 0
    values, scale, offset = block_weights(random, form, vocabulary, 130)
    # Equal logits, next to each other and far apart.
    for part in (values, scale, offset):
        if part is not None:
            part[3] = part[2] = part[vocabulary - 1]
    q, a = quantized(x, form=form)
    tolerance = {"rtol": 0.0, "atol": 0.0}
    if form:
        expected = block_reference(x, values, scale, offset, form=form)
        # Products are rounded before they are added.
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        packed = packed_blocks(form, values, scale, offset)
    else:
        scale = scale[:, 0]
        expected = linear_reference(x, values, scale)
        packed = {"weight": tensor(pack_weight(values)), "scale": tensor(pack_channels(scale))}
    if softcap:
        expected = softcap * np.tanh(expected / softcap)
        # tanh by way of e^x has an error of some units in the last place of 1; the cap multiplies it.
        tolerance["atol"] = 4e-7 * softcap
    tiles, most = tiles_of(vocabulary, TILE_OUTPUTS), 8
    for tile in FORMS[form].head_tile_tokens:
        logits = torch.full((tokens, vocabulary), np.nan)
        keys = torch.zeros((tokens, tiles, most), dtype=torch.int64)
        for writes in (0, 1):
            run(
                kernel_of(LmHead(tokens=tile, likeliest=most, bias=False, softcap=softcap > 0, form=form)),
                (tiles_of(tokens, tile), tiles),
                q=q,
                a=a,
                **packed,
                bias=NOTHING,
                logits=logits,
                keys=keys,
                tokens=tokens,
                vocabulary=vocabulary,
                input_tiles=2,
                writes_logits=writes,
                softcap=softcap,
            )
            assert bool(torch.isnan(logits).all()) == (not writes)
        np.testing.assert_allclose(logits, expected, **tolerance)
        best = likeliest(logits.numpy())
        np.testing.assert_array_equal(merged(keys.reshape(tokens, -1), top_k)[0], best[:, 0])
        np.testing.assert_array_equal(merged(keys.reshape(tokens, -1), top_k)[1], best[:, :top_k])


def merged(keys, top_k):
    tokens, count = keys.shape
    parts = tiles_of(count, MERGED)
    between = torch.zeros((tokens, parts, 8), dtype=torch.int64)
    next_tokens, top_tokens = torch.zeros(tokens, dtype=torch.int64), torch.zeros((tokens, top_k), dtype=torch.int64)
    ends = {"next_tokens": next_tokens, "top_tokens": top_tokens}
    first = {"keys": keys, "merged": between, **ends, "count": count, "top_k": top_k}
    run(kernel_of(MergeLikeliest(likeliest=8, final=False)), (tokens, parts), **first)
    rest = {"keys": between, "merged": between, **ends, "count": 8 * parts, "top_k": top_k}
    run(kernel_of(MergeLikeliest(likeliest=8, final=True)), (tokens, 1), **rest)
    return next_tokens.numpy(), top_tokens.numpy()


def test_logits_that_are_no_numbers_have_no_token():
    key = torch.full((2, 5000), -7, dtype=torch.int64)
    key[0, 4000] = 0x7FFFFFFFFFFFFFFF
    key[1, 4000] = (5 << 32) | (0xFFFFFFFF - 11)
    assert merged(key, 8)[0].tolist() == [-1, 11]


def test_a_row_without_numbers_has_no_likeliest_tokens():
    """From the hidden state to log-probabilities: nothing is read beyond the logits, and the other row is whole."""
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 128)).astype(np.float32)
    x[0] = np.nan
    values = random.integers(-127, 128, (160, 128)).astype(np.int8)
    q, a = quantized(x)
    logits, keys = torch.zeros((2, 160)), torch.zeros((2, 3, 8), dtype=torch.int64)
    run(
        kernel_of(LmHead(tokens=16, likeliest=8, bias=False, softcap=False)),
        (1, 3),
        q=q,
        a=a,
        weight=tensor(pack_weight(values)),
        scale=tensor(pack_channels(np.full(160, 1e-3, np.float32))),
        bias=NOTHING,
        logits=logits,
        keys=keys,
        tokens=2,
        vocabulary=160,
        input_tiles=1,
        writes_logits=1,
        softcap=0.0,
    )
    tokens = merged(keys.reshape(2, -1), 8)[1]
    assert (tokens[0] == -1).all()
    assert ((tokens[1] >= 0) & (tokens[1] < 160)).all()
    y = torch.zeros((2, 8))
    given = {"logits": logits, "tokens": tensor(tokens), "y": y, "vocabulary": 160}
    run(kernel_of(Likelihoods(likeliest=8)), (2,), **given)
    assert torch.isnan(y[0]).all()
    np.testing.assert_allclose(y[1], logits[1].log_softmax(-1)[tokens[1]], rtol=2e-6, atol=2e-6)
