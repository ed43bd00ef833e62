"""verify_attention as two Triton kernels: over the committed cache in splits, then over the end of each token's path.

A token's bits depend on its own path alone. Positions are counted along the path, and blocks of 64 of them always start
at multiples of 64. Blocks that end well before the token, further than the widest pass reaches, lie in the committed
cache in path order whatever was drafted: `attend_cache` takes those, for the tokens of one sequence and the heads of a
group in one tile whose shape never changes, in splits of 256 positions. `attend_path` adds the splits up in order and
goes on with the blocks that are left, whose positions it looks up one by one: the last committed ones, a token's
ancestors, itself.

Queries and weights are float32: each is fed to the tensor cores as two values of the cache's type, so that only keys
and values are rounded to that type, as in the operators of a CPU. The cache's bytes are what attention waits for.
Integers of an INT8 cache are float16 as soon as they are loaded, exactly: the scales of keys are multiplied into the
queries before, those of values into the context at the end.
"""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel, optional_arguments
from plugins.gpu.variants import (
    BLOCK,
    PATH_ROWS,
    SPLIT,
    TRITON_TYPES,
    Attend,
    AttendCache,
    AttendPath,
    power_of_2,
    tile_rows,
)

_BLOCK, _SPLIT = tl.constexpr(BLOCK), tl.constexpr(SPLIT)
_PATH_ROWS = tl.constexpr(PATH_ROWS)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Scales of integers are small: what they are multiplied by meanwhile, so that two float16 numbers have their bits.
_RAISED = tl.constexpr(128.0)


def attend_cache(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    positions,
    slots,
    tiles,
    partial,
    partial_stats,
    first_token,
    heads,
    kv_heads,
    capacity,
    most_splits,
    scale,
    softcap,
    window,
    key_scale,
    INT8: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    REACH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Split `program_id(2)` for group `program_id(0)` and tile `first_token + program_id(1)` of the tokens.

    `tiles` int32 [T, 2]: the first token of each tile and how many it has, up to ROWS / PADDED, all of one sequence:
    its `slots`. A tile of none does nothing. `queries` float32 [T, H, SIZE], rotated. Of each token from `first_token`
    on, head and split it leaves the weighted sum of values in `partial` float32 [tokens, H, most_splits, SIZE],
    unscaled, and the largest score (base 2) and the sum of weights in `partial_stats` float32 [tokens, H, most_splits,
    2]. GROUP: heads of a group; PADDED and WIDE: GROUP and SIZE, rounded up to a power of two; ROWS: tokens × PADDED.
    With INT8 a key is its integers times `key_scale` float32 [G, SIZE], and values are summed without their scale.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    kind: tl.constexpr = tl.float16 if INT8 else keys.dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(2)
    at_tile = tiles + 2 * (first_token + tl.program_id(1))
    first, count = tl.load(at_tile), tl.load(at_tile + 1)
    row = tl.arange(0, ROWS)
    token = first + row // PADDED
    head = group * GROUP + row % PADDED
    real = (row // PADDED < count) & (row % PADDED < GROUP)
    position = tl.load(positions + token, mask=real, other=0)
    tail = tl.maximum(position - (REACH - 1), 0) // _BLOCK * _BLOCK
    end = tl.minimum((split + 1) * _SPLIT, tl.max(tl.where(real, tail, 0), axis=0))
    start = split * _SPLIT
    if WINDOW:
        # Blocks that no token of the tile sees add nothing to any of them.
        oldest = tl.min(tl.where(real, tl.maximum(position - window + 1, 0), end), axis=0)
        start = tl.maximum(start, oldest // _BLOCK * _BLOCK)
    if start < end:
        column = tl.arange(0, WIDE)
        inside = column < SIZE
        at_queries = (token.to(tl.int64) * heads + head) * SIZE
        q = tl.load(queries + at_queries[:, None] + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        if INT8:
            raised = tl.load(key_scale + group * SIZE + column, mask=inside, other=0.0) * _RAISED
            q = q * raised[None, :]
            scale = scale / _RAISED
        q_high = q.to(kind)
        q_low = (q - q_high.to(tl.float32)).to(kind)
        slot = tl.load(slots + first).to(tl.int64)
        cache = (slot * kv_heads + group) * capacity
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        context = tl.zeros((ROWS, WIDE), tl.float32)
        for block in range(start, end, _BLOCK):
            place = block + tl.arange(0, _BLOCK)
            at = (cache + place)[:, None] * SIZE + column[None, :]
            k = tl.load(keys + at, mask=inside[None, :], other=0.0).to(kind)
            k = tl.trans(k)
            scores = tl.dot(q_low, k, tl.dot(q_high, k)) * scale
            if SOFTCAP:
                # tanh(x) = 1 - 2 / (1 + e^2x)
                scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
            seen = place[None, :] < tail[:, None]
            if WINDOW:
                seen = seen & (place[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores * _LOG2_E, float("-inf"))
            highest = tl.maximum(largest, tl.max(scores, axis=1))
            # A row that has seen nothing yet: its weights must be zeros, not NaN.
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(scores - base[:, None])
            faded = tl.exp2(largest - base)
            v = tl.load(values + at, mask=inside[None, :], other=0.0).to(kind)
            high = weights.to(v.dtype)
            low = (weights - high.to(tl.float32)).to(v.dtype)
            context = tl.dot(low, v, tl.dot(high, v, context * faded[:, None]))
            total = total * faded + tl.sum(weights, axis=1)
            largest = highest
        at_partial = ((token - first_token).to(tl.int64) * heads + head) * most_splits + split
        tl.store(partial + at_partial[:, None] * SIZE + column[None, :], context, mask=real[:, None] & inside[None, :])
        tl.store(partial_stats + 2 * at_partial, largest, mask=real)
        tl.store(partial_stats + 2 * at_partial + 1, total, mask=real)


def attend_path(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    positions,
    committed,
    ancestors,
    slots,
    partial,
    partial_stats,
    context,
    first_token,
    heads,
    kv_heads,
    capacity,
    most_splits,
    scale,
    softcap,
    window,
    key_scale,
    value_scale,
    INT8: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    REACH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Token `first_token + program_id(0)`, group `program_id(1)`: context float32 [T, H · SIZE], complete.

    `committed` int32 [T]: positions of a path below it lie at the same place in the cache; the later ones, of a tree,
    at `committed` + `ancestors` int32 [T, REACH], of which column d is the index of the ancestor at depth d. With INT8
    keys and values are their integers times `key_scale` and `value_scale` float32 [G, SIZE].
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    kind: tl.constexpr = tl.float16 if INT8 else keys.dtype.element_ty
    index, group = tl.program_id(0), tl.program_id(1)
    token = (first_token + index).to(tl.int64)
    row = tl.arange(0, _PATH_ROWS)
    head = group * GROUP + row
    real = row < GROUP
    column = tl.arange(0, WIDE)
    inside = column < SIZE
    at_head = token * heads + head
    shown = real[:, None] & inside[None, :]
    q = tl.load(queries + at_head[:, None] * SIZE + column[None, :], mask=shown, other=0.0)
    at_scale = group * SIZE + column
    if INT8:
        raised = tl.load(key_scale + at_scale, mask=inside, other=0.0) * _RAISED
        q = q * raised[None, :]
        scale = scale / _RAISED
    q_high = q.to(kind)
    q_low = (q - q_high.to(tl.float32)).to(kind)
    position = tl.load(positions + token)
    known = tl.load(committed + token)
    cache = (tl.load(slots + token).to(tl.int64) * kv_heads + group) * capacity
    tail = tl.maximum(position - (REACH - 1), 0) // _BLOCK * _BLOCK
    largest = tl.full((_PATH_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((_PATH_ROWS,), tl.float32)
    sums = tl.zeros((_PATH_ROWS, WIDE), tl.float32)
    end_split = (tail + _SPLIT - 1) // _SPLIT
    first_split = 0
    if WINDOW:
        # `attend_cache` leaves nothing of splits that end before the window, nor where the window starts at `tail`.
        oldest = tl.maximum(position - window + 1, 0)
        first_split = tl.where(oldest < tail, oldest // _SPLIT, end_split)
    # Eight splits are loaded at a time, and added one after the other.
    for split in tl.range(first_split, end_split, loop_unroll_factor=8):
        at_partial = (index.to(tl.int64) * heads + head) * most_splits + split
        part = tl.load(partial + at_partial[:, None] * SIZE + column[None, :], mask=shown, other=0.0)
        highest = tl.load(partial_stats + 2 * at_partial, mask=real, other=float("-inf"))
        weight = tl.load(partial_stats + 2 * at_partial + 1, mask=real, other=0.0)
        both = tl.maximum(largest, highest)
        base = tl.where(both == float("-inf"), 0.0, both)
        faded, added = tl.exp2(largest - base), tl.exp2(highest - base)
        sums = sums * faded[:, None] + part * added[:, None]
        total = total * faded + weight * added
        largest = both
    for block in range(tail, position + 1, _BLOCK):
        place = block + tl.arange(0, _BLOCK)
        seen = place <= position
        if WINDOW:
            seen = seen & (place >= oldest)
        depth = place - known
        drafted = seen & (depth >= 0)
        lookup = tl.load(ancestors + token * REACH + depth, mask=drafted, other=0)
        physical = tl.where(drafted, known + lookup, place)
        at = (cache + physical)[:, None] * SIZE + column[None, :]
        read = seen[:, None] & inside[None, :]
        k = tl.load(keys + at, mask=read, other=0.0).to(kind)
        k = tl.trans(k)
        scores = tl.dot(q_low, k, tl.dot(q_high, k)) * scale
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
        scores = tl.where(seen[None, :], scores * _LOG2_E, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        faded = tl.exp2(largest - base)
        v = tl.load(values + at, mask=read, other=0.0).to(kind)
        high = weights.to(v.dtype)
        low = (weights - high.to(tl.float32)).to(v.dtype)
        sums = tl.dot(low, v, tl.dot(high, v, sums * faded[:, None]))
        total = total * faded + tl.sum(weights, axis=1)
        largest = highest
    means = sums / total[:, None]
    if INT8:
        means = means * tl.load(value_scale + at_scale, mask=inside, other=0.0)[None, :]
    tl.store(context + at_head[:, None] * SIZE + column[None, :], means, mask=shown)


def cache_kernel(variant: AttendCache) -> Kernel:
    """`attend_cache` of a variant."""
    wide = _width(variant)
    scales, unused = optional_arguments(["key_scale"], "*fp32", taken=variant.cache_type == "int8")
    return Kernel(
        name=variant.name,
        function=attend_cache,
        overlaps=True,
        signature={
            **_caches(variant),
            "positions": "*i32",
            "slots": "*i32",
            "tiles": "*i32",
            **_SCRATCH,
            "first_token": "i32",
            **_NUMBERS,
            **scales,
        },
        constants={
            **unused,
            **_constants(variant),
            "ROWS": tile_rows(variant.head_size),
            "PADDED": power_of_2(variant.group),
            "SIZE": variant.head_size,
            "WIDE": wide,
        },
        # With half as many, a thread's part of queries and sums does not fit its registers.
        num_warps=8,
        # Wider heads leave no room in shared memory for a tile that is loaded ahead; integers of narrow ones leave none
        # in the registers of 8.0.
        num_stages=1 if wide > 128 or (variant.cache_type == "int8" and wide <= 64) else 2,
        # As many as one program of a multiprocessor may have, less a little: left alone, the assembler aims at half of
        # them for 12.0, where shared memory has no room for a second program, and spills.
        most_registers=None if wide > 128 else 232,
        aligned=(*_caches(variant), *_SCRATCH),
    )


def path_kernel(variant: AttendPath) -> Kernel:
    """`attend_path` of a variant."""
    wide = _width(variant)
    scales, unused = optional_arguments(["key_scale", "value_scale"], "*fp32", taken=variant.cache_type == "int8")
    return Kernel(
        name=variant.name,
        function=attend_path,
        overlaps=True,
        signature={
            **_caches(variant),
            "positions": "*i32",
            "committed": "*i32",
            "ancestors": "*i32",
            "slots": "*i32",
            **_SCRATCH,
            "context": "*fp32",
            "first_token": "i32",
            **_NUMBERS,
            **scales,
        },
        constants=unused | _constants(variant) | {"SIZE": variant.head_size, "WIDE": wide},
        num_warps=8 if wide > 128 else 4,
        num_stages=2,
        # A part of a pass has two programs for each multiprocessor or fewer: left alone, the assembler makes room for
        # five of these, and spills.
        most_registers=200 if wide > 128 else 232 if wide == 128 else 168 if variant.cache_type == "int8" else None,
        aligned=(*_caches(variant), *_SCRATCH, "context"),
    )


_SCRATCH = {"partial": "*fp32", "partial_stats": "*fp32"}
_NUMBERS = {
    **dict.fromkeys(("heads", "kv_heads", "capacity", "most_splits"), "i32"),
    "scale": "fp32",
    "softcap": "fp32",
    "window": "i32",
}


def _caches(variant: Attend) -> dict[str, str]:
    return {"queries": "*fp32", **dict.fromkeys(("keys", "values"), f"*{TRITON_TYPES[variant.cache_type]}")}


def _constants(variant: Attend) -> dict[str, int]:
    return {
        "INT8": int(variant.cache_type == "int8"),
        "SOFTCAP": int(variant.softcap),
        "WINDOW": int(variant.window),
        "REACH": variant.reach,
        "GROUP": variant.group,
    }


def _width(variant: Attend) -> int:
    """Columns of a tile of keys: 16 are the least that tensor cores take."""
    return max(16, power_of_2(variant.head_size))
