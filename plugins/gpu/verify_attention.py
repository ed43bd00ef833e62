"""verify_attention as two Triton kernels: over the committed cache in splits, then over the end of each token's path.

A token's bits depend on its own path alone. Positions are counted along the path, and blocks of 64 of them always start
at multiples of 64. Blocks that end well before the token, further than the widest pass reaches, lie in the committed
cache in path order whatever was drafted: `attend_cache` takes those, for all tokens and heads of a group in one tile
whose shape never changes, in splits of 256 positions. `attend_path` adds the splits up in order and goes on with the
blocks that are left, whose positions it looks up one by one: the last committed ones, a token's ancestors, itself.
"""

import triton.language as tl

from plugins.gpu.kernel import Kernel

# Positions of a block and of a split, on a token's own path.
BLOCK, SPLIT = 64, 256
# Rows of a tile of `attend_cache`: tokens × heads of a group, rounded up to a power of two.
TILE_ROWS = 64
# Rows of a tile of `attend_path`: the heads of a group; the least that tensor cores take.
PATH_ROWS = 16
_BLOCK, _SPLIT, _TILE_ROWS = tl.constexpr(BLOCK), tl.constexpr(SPLIT), tl.constexpr(TILE_ROWS)
_PATH_ROWS = tl.constexpr(PATH_ROWS)
_LOG2_E = tl.constexpr(1.4426950408889634)


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of a tile of `attend_cache`."""
    return TILE_ROWS // (1 << (heads // kv_heads - 1).bit_length())


def tail_start(position: int, reach: int) -> int:
    """The first position that `attend_path` takes, for a token at `position` of its path; `reach`: widest pass."""
    return max(0, position - (reach - 1)) // BLOCK * BLOCK


def num_splits(cache_length: int, width: int, reach: int) -> int:
    """Splits of the longest path of a pass of `width` tokens after `cache_length`."""
    return -(-tail_start(cache_length + width - 1, reach) // SPLIT)


def attend_cache(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    positions,
    slots,
    partial,
    partial_stats,
    first_token,
    tokens,
    heads,
    kv_heads,
    capacity,
    most_splits,
    scale,
    softcap,
    window,
    SOFTCAP: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    REACH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):
    """Split `program_id(2)` for group `program_id(0)` and tile `program_id(1)` of the tokens from `first_token` on.

    `queries` [T, H, SIZE], rotated. All tokens of a tile are of one sequence: its `slots`. Of each token, head and
    split it leaves the weighted sum of values in `partial` float32 [tokens, H, most_splits, SIZE], unscaled, and the
    largest score (base 2) and the sum of weights in `partial_stats` float32 [tokens, H, most_splits, 2]. GROUP: heads
    of a group; PADDED and WIDE: GROUP and SIZE, rounded up to a power of two.
    """
    group, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_size: tl.constexpr = _TILE_ROWS // PADDED
    row = tl.arange(0, _TILE_ROWS)
    token = tile * tile_size + row // PADDED
    head = group * GROUP + row % PADDED
    real = (token < tokens) & (row % PADDED < GROUP)
    position = tl.load(positions + first_token + token, mask=real, other=0)
    tail = tl.maximum(position - (REACH - 1), 0) // _BLOCK * _BLOCK
    end = tl.minimum((split + 1) * _SPLIT, tl.max(tl.where(real, tail, 0), axis=0))
    start = split * _SPLIT
    if start < end:
        column = tl.arange(0, WIDE)
        inside = column < SIZE
        at_queries = ((first_token + token).to(tl.int64) * heads + head) * SIZE
        q = tl.load(queries + at_queries[:, None] + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        slot = tl.load(slots + first_token + tile * tile_size).to(tl.int64)
        cache = (slot * kv_heads + group) * capacity
        largest = tl.full((_TILE_ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((_TILE_ROWS,), tl.float32)
        context = tl.zeros((_TILE_ROWS, WIDE), tl.float32)
        for block in range(start, end, _BLOCK):
            place = block + tl.arange(0, _BLOCK)
            at = (cache + place)[:, None] * SIZE + column[None, :]
            k = tl.load(keys + at, mask=inside[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k)) * scale
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
            v = tl.load(values + at, mask=inside[None, :], other=0.0)
            context = context * faded[:, None] + tl.dot(weights.to(v.dtype), v)
            total = total * faded + tl.sum(weights, axis=1)
            largest = highest
        at_partial = (token.to(tl.int64) * heads + head) * most_splits + split
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
    SOFTCAP: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    REACH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):
    """Token `first_token + program_id(0)`, group `program_id(1)`: context float32 [T, H · SIZE], complete.

    `committed` int32 [T]: positions of a path below it lie at the same place in the cache; the later ones, of a tree,
    at `committed` + `ancestors` int32 [T, REACH], of which column d is the index of the ancestor at depth d.
    """
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
    position = tl.load(positions + token)
    known = tl.load(committed + token)
    cache = (tl.load(slots + token).to(tl.int64) * kv_heads + group) * capacity
    tail = tl.maximum(position - (REACH - 1), 0) // _BLOCK * _BLOCK
    largest = tl.full((_PATH_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((_PATH_ROWS,), tl.float32)
    sums = tl.zeros((_PATH_ROWS, WIDE), tl.float32)
    for split in range((tail + _SPLIT - 1) // _SPLIT):
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
            seen = seen & (place > position - window)
        depth = place - known
        drafted = seen & (depth >= 0)
        lookup = tl.load(ancestors + token * REACH + depth, mask=drafted, other=0)
        physical = tl.where(drafted, known + lookup, place)
        at = (cache + physical)[:, None] * SIZE + column[None, :]
        read = seen[:, None] & inside[None, :]
        k = tl.load(keys + at, mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
        scores = tl.where(seen[None, :], scores * _LOG2_E, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        faded = tl.exp2(largest - base)
        v = tl.load(values + at, mask=read, other=0.0)
        sums = sums * faded[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * faded + tl.sum(weights, axis=1)
        largest = highest
    tl.store(context + at_head[:, None] * SIZE + column[None, :], sums / total[:, None], mask=shown)


def kernels_for(
    heads: int, kv_heads: int, head_size: int, reach: int, cache_type: str, *, softcap: bool, window: bool
) -> tuple[Kernel, Kernel]:
    """`attend_cache` and `attend_path` for a layer's attention; `cache_type`: fp16 or bf16."""
    group = heads // kv_heads
    wide = max(16, 1 << (head_size - 1).bit_length())
    shape = {"SOFTCAP": int(softcap), "WINDOW": int(window), "REACH": reach, "GROUP": group}
    ends = f"{group}_{head_size}_{reach}{'_softcap' if softcap else ''}{'_window' if window else ''}_{cache_type}"
    caches = dict.fromkeys(("queries", "keys", "values"), f"*{cache_type}")
    scratch = {"partial": "*fp32", "partial_stats": "*fp32"}
    sizes = dict.fromkeys(("heads", "kv_heads", "capacity", "most_splits"), "i32")
    last = {"scale": "fp32", "softcap": "fp32", "window": "i32"}
    return (
        Kernel(
            name=f"attend_cache_{ends}",
            function=attend_cache,
            signature={
                **caches,
                "positions": "*i32",
                "slots": "*i32",
                **scratch,
                "first_token": "i32",
                "tokens": "i32",
                **sizes,
                **last,
            },
            constants={**shape, "PADDED": 1 << (group - 1).bit_length(), "SIZE": head_size, "WIDE": wide},
            num_warps=8 if wide > 128 else 4,
            # Wider heads leave no room in shared memory for a tile that is loaded ahead.
            num_stages=1 if wide > 128 else 2,
            aligned=(*caches, *scratch),
        ),
        Kernel(
            name=f"attend_path_{ends}",
            function=attend_path,
            signature={
                **caches,
                "positions": "*i32",
                "committed": "*i32",
                "ancestors": "*i32",
                "slots": "*i32",
                **scratch,
                "context": "*fp32",
                "first_token": "i32",
                **sizes,
                **last,
            },
            constants={**shape, "SIZE": head_size, "WIDE": wide},
            num_warps=4,
            num_stages=2,
            aligned=(*caches, *scratch, "context"),
        ),
    )
