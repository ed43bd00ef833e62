"""lm_head as Triton kernels: the linear whose logits need not be written, and the likeliest tokens of them.

A logit and its token are one 64-bit key: larger is likelier, and of equal logits the lower token. `lm_head` leaves the
largest keys of every tile, and `merge_likeliest` picks the largest of those, in two rounds.
"""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.block_linear import add_unit, form_constants, operand_types
from plugins.gpu.kernel import Kernel
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS
from plugins.gpu.variants import FORMS, MERGED, LmHead, MergeLikeliest
from quasar import numerics

_UNIT_STEP = tl.constexpr(numerics.UNIT_STEP)
_BLOCK = tl.constexpr(numerics.BLOCK)
# The key of a logit that is not a number: above all others. Its token is -1.
_NOT_A_NUMBER = tl.constexpr(0x7FFFFFFFFFFFFFFF)
# Below every key.
_LEAST = tl.constexpr(-0x8000000000000000)


def lm_head(  # type: ignore[no-untyped-def]
    q,
    a,
    weight,
    scale,
    bias,
    logits,
    keys,
    tokens,
    vocabulary,
    input_tiles,
    writes_logits,
    softcap,
    IN_BLOCKS: tl.constexpr,  # noqa: N803
    HAS_NIBBLES: tl.constexpr,  # noqa: N803
    OFFSETS: tl.constexpr,  # noqa: N803
    PLANES: tl.constexpr,  # noqa: N803
    BIAS: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    LIKELIEST: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """As `w8a8_linear`, or IN_BLOCKS as `block_linear` in one part.

    For the tile `program_id(0)` of tokens and the vocabulary's tile `program_id(1)`.

    `keys` int64 [T, tiles, LIKELIEST] gets the tile's largest keys; `logits` float32 [T, vocabulary] is written only
    if `writes_logits` is not 0. With SOFTCAP both are of softcap · tanh(logit / softcap).
    """
    token_tile, output_tile = tl.program_id(0), tl.program_id(1)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    output = tl.arange(0, OUTPUTS)
    tile_bytes: tl.constexpr = OUTPUTS * INPUTS // 2 if HAS_NIBBLES else OUTPUTS * INPUTS
    base = weight + output_tile.to(tl.int64) * input_tiles * tile_bytes
    if OVERLAP:
        gdc_launch_dependents()
        # Weights do not depend on the kernel before: their first lines come while that one ends.
        line = tl.minimum(tl.arange(0, 256) * 128, input_tiles * tile_bytes - 128)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [base + line], tl.int32, is_pure=False, pack=1
        )
        gdc_wait()
    inside = token[None, :] < tokens
    channel = output_tile * OUTPUTS + output
    if IN_BLOCKS:
        blocks: tl.constexpr = 2 if HAS_NIBBLES else 1
        scales: tl.constexpr = 2 * OUTPUTS if OFFSETS else OUTPUTS
        planes: tl.constexpr = 2 if PLANES else 1
        inputs = input_tiles * INPUTS
        units = input_tiles * (INPUTS // (_BLOCK * blocks))
        k = tl.arange(0, _BLOCK)
        at_weight = base + output[:, None] * _BLOCK + k[None, :]
        at_q = q + token[None, :].to(tl.int64) * (planes * inputs) + k[:, None]
        at_scale = scale + output_tile.to(tl.int64) * units * (blocks * scales) + output
        at_amax = a + token[None, :].to(tl.int64) * (units * blocks)
        result = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        for _ in range(units):
            result = add_unit(
                result, at_weight, at_q, at_scale, at_amax, inside, inputs, HAS_NIBBLES, OFFSETS, PLANES, OUTPUTS
            )
            at_weight += OUTPUTS * _BLOCK
            at_q += blocks * _BLOCK
            at_scale += blocks * scales
            at_amax += blocks
    else:
        k = tl.arange(0, INPUTS)
        at_weight = base + output[:, None] * INPUTS + k[None, :]
        at_q = q + token[None, :].to(tl.int64) * (input_tiles * INPUTS) + k[:, None]
        product = tl.zeros((OUTPUTS, TOKENS), tl.int32)
        for _ in range(input_tiles):
            x = tl.load(at_q, mask=inside, other=0)
            product = tl.dot(tl.load(at_weight, eviction_policy="evict_first"), x, product, out_dtype=tl.int32)
            at_weight += tile_bytes
            at_q += INPUTS
        amax = tl.load(a + token, mask=token < tokens, other=0.0)[None, :]
        result = product.to(tl.float32) * (tl.load(scale + channel) * _UNIT_STEP)[:, None] * amax
    if BIAS:
        result = result + tl.load(bias + channel)[:, None]
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^2x); of numbers near 0 it keeps digits down to 1e-7, as far as softcap's own.
        result = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * result / softcap)))
    written = inside & (channel[:, None] < vocabulary)
    if writes_logits != 0:
        tl.store(logits + token[None, :].to(tl.int64) * vocabulary + channel[:, None], result, mask=written)
    # Floats as integers of the same order; adding 0 makes -0 a 0, which is its equal.
    bits = (result + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = (order << 32) | (0xFFFFFFFF - channel.to(tl.int64))[:, None]
    key = tl.where(result == result, key, _NOT_A_NUMBER)
    key = tl.where(written, key, _LEAST)
    at_keys = keys + (token.to(tl.int64) * tl.num_programs(1) + output_tile) * LIKELIEST
    for place in range(LIKELIEST):
        largest = tl.max(key, axis=0)
        tl.store(at_keys + place, largest, mask=token < tokens)
        key = tl.where(key == largest[None, :], _LEAST, key)


def merge_likeliest(  # type: ignore[no-untyped-def]
    keys,
    merged,
    next_tokens,
    top_tokens,
    count,
    top_k,
    FINAL: tl.constexpr,  # noqa: N803
    LIKELIEST: tl.constexpr,  # noqa: N803
    MERGED: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """The largest of the keys `program_id(1)` · MERGED … of row `program_id(0)` of `keys` int64 [T, count].

    They go to `merged` int64 [T, programs, LIKELIEST]; with FINAL, their tokens to `next_tokens` int64 [T] and
    `top_tokens` int64 [T, top_k].
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = part * MERGED + tl.arange(0, MERGED)
    key = tl.load(keys + row * count + offsets, mask=offsets < count, other=_LEAST)
    for place in range(LIKELIEST):
        largest = tl.max(key, axis=0)
        if FINAL:
            # Below numbers that are none there are no keys of tokens, nor below those of a small vocabulary.
            is_token = (largest != _NOT_A_NUMBER) & (largest != _LEAST)
            token = tl.where(is_token, 0xFFFFFFFF - (largest & 0xFFFFFFFF), -1)
            if place == 0:
                tl.store(next_tokens + row, token)
            if place < top_k:
                tl.store(top_tokens + row * top_k + place, token)
        else:
            tl.store(merged + (row * tl.num_programs(1) + part) * LIKELIEST + place, largest)
        key = tl.where(key == largest, _LEAST, key)


def head_kernel(variant: LmHead) -> Kernel:
    """`lm_head` of a variant."""
    pointers = operand_types(variant.form) | {"bias": "*fp32", "logits": "*fp32"}
    return Kernel(
        name=variant.name,
        function=lm_head,
        overlaps=True,
        signature={
            **pointers,
            "keys": "*i64",
            **dict.fromkeys(("tokens", "vocabulary", "input_tiles", "writes_logits"), "i32"),
            "softcap": "fp32",
        },
        constants={
            "IN_BLOCKS": int(FORMS[variant.form].in_blocks),
            **form_constants(variant.form),
            "BIAS": int(variant.bias),
            "SOFTCAP": int(variant.softcap),
            "LIKELIEST": variant.likeliest,
            "TOKENS": variant.tokens,
            "OUTPUTS": TILE_OUTPUTS,
            "INPUTS": TILE_INPUTS,
        },
        num_warps=4,
        num_stages=4,
        aligned=(*pointers, "keys"),
    )


def merge_kernel(variant: MergeLikeliest) -> Kernel:
    """`merge_likeliest` of a variant."""
    pointers = dict.fromkeys(("keys", "merged", "next_tokens", "top_tokens"), "*i64")
    return Kernel(
        name=variant.name,
        function=merge_likeliest,
        overlaps=True,
        signature={**pointers, "count": "i32", "top_k": "i32"},
        constants={"FINAL": int(variant.final), "LIKELIEST": variant.likeliest, "MERGED": MERGED},
        num_warps=8,
        aligned=("keys", "merged"),
    )
