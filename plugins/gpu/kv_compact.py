"""kv_compact as a Triton kernel: all layers in one launch, in words of 4 bytes, so that any type of cache will do."""

import triton.language as tl

from plugins.gpu.kernel import Kernel
from plugins.kv_compact import BLOCK_WORDS


def kv_compact(  # type: ignore[no-untyped-def]
    cache_table,
    path_table,
    cache_length,
    path_length,
    capacity,
    row_words,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program moves one block of words of one head of one cache, position after position (plugins.kv_compact)."""
    cache = tl.load(cache_table + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    head = tl.program_id(1).to(tl.int64)
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = words < row_words
    front = cache + (head * capacity + cache_length) * row_words + words
    # Ascending indices: none is overwritten before it was read, and no other program touches these words.
    for row in range(path_length):
        source = tl.load(path_table + row)
        moved = tl.load(front + source * row_words, mask=inside)
        tl.store(front + row * row_words, moved, mask=inside)


KERNEL = Kernel(
    function=kv_compact,
    signature={
        "cache_table": "*i64",
        "path_table": "*i64",
        "cache_length": "i64",
        "path_length": "i64",
        "capacity": "i64",
        "row_words": "i64",
    },
    constants={"BLOCK": BLOCK_WORDS},
    num_warps=4,
)
