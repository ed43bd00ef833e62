"""Linears in blocks of 32 inputs as a Triton kernel: INT8 tensor cores block by block, weights in 8 or 4 bits.

The products of a block are summed in int32, which is exact; a block's sum is scaled and added to those before it.
Blocks are added in parts that follow from the linear and the GPU alone, and parts in their order: so a token's bits do
not depend on the tile, on how many tokens are fed, or on whether programs share the parts.

Activations of 16 bits are two integers of 8: sums of a block are below 2^24, which float32 holds.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS
from plugins.gpu.variants import FORMS, GATES, BlockLinear
from quasar import numerics

_UNIT_STEP, _WIDE_STEP = tl.constexpr(numerics.UNIT_STEP), tl.constexpr(numerics.WIDE_STEP)
_INPUTS = tl.constexpr(numerics.BLOCK)
_GELU_TANH = tl.constexpr(GATES.index("gelu_tanh"))
# As in w8a8_linear.
_GELU_X, _GELU_CUBE = tl.constexpr(-1.5957691216057308), tl.constexpr(-0.07135481282731867)
# Rounded 4-bit weights lie around 8.
_MIDDLE = tl.constexpr(8)


@triton.jit  # type: ignore[untyped-decorator]
def add_unit(  # type: ignore[no-untyped-def]
    result,
    at_weight,
    at_q,
    at_scale,
    at_amax,
    inside,
    stride,
    HAS_NIBBLES: tl.constexpr,  # noqa: N803
    OFFSETS: tl.constexpr,  # noqa: N803
    PLANES: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
):
    """Result float32 [OUTPUTS, tokens] and what one packed unit adds to it: a block, or with HAS_NIBBLES two.

    Pointers: `at_weight` [OUTPUTS, 32] bytes; `at_q` [32, tokens], `at_scale` [OUTPUTS] and `at_amax` [1, tokens] of
    the first block. A byte of nibbles has an input of it in its low bits, and of the next block in its high ones.
    `stride`: with PLANES, from the first of them to the second.
    """
    packed = tl.load(at_weight, eviction_policy="evict_first")
    if HAS_NIBBLES:
        middle: tl.constexpr = 0 if OFFSETS else _MIDDLE
        scales: tl.constexpr = 2 * OUTPUTS if OFFSETS else OUTPUTS
        low = ((packed & 15) - middle).to(tl.int8)
        result = add_block(result, low, at_q, at_scale, at_amax, inside, stride, OFFSETS, PLANES, OUTPUTS)
        high = (((packed >> 4) & 15) - middle).to(tl.int8)
        at_q, at_scale, at_amax = at_q + _INPUTS, at_scale + scales, at_amax + 1
        result = add_block(result, high, at_q, at_scale, at_amax, inside, stride, OFFSETS, PLANES, OUTPUTS)
    else:
        result = add_block(result, packed, at_q, at_scale, at_amax, inside, stride, OFFSETS, PLANES, OUTPUTS)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def add_block(  # type: ignore[no-untyped-def]
    result,
    weight,
    at_q,
    at_scale,
    at_amax,
    inside,
    stride,
    OFFSETS: tl.constexpr,  # noqa: N803
    PLANES: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
):
    """Result and the scaled products of weights [OUTPUTS, 32] with one block of every token.

    With OFFSETS, those of the block follow its scales, and the sum of a token's inputs is multiplied by them.
    """
    x = tl.load(at_q, mask=inside, other=0)
    unit: tl.constexpr = _WIDE_STEP if PLANES else _UNIT_STEP
    step = tl.load(at_scale).to(tl.float32) * unit
    amax = tl.load(at_amax, mask=inside, other=0.0)
    product = tl.dot(weight, x, out_dtype=tl.int32)
    if PLANES:
        rest = tl.load(at_q + stride, mask=inside, other=0)
        product = tl.dot(weight, rest, product * 256, out_dtype=tl.int32)
    result = result + product.to(tl.float32) * (step[:, None] * amax)
    if OFFSETS:
        total = tl.sum(x.to(tl.int32), axis=0)
        if PLANES:
            total = total * 256 + tl.sum(rest.to(tl.int32), axis=0)
        shift = tl.load(at_scale + OUTPUTS).to(tl.float32) * unit
        result = result + shift[:, None] * (total.to(tl.float32)[None, :] * amax)
    return result


def block_linear(  # type: ignore[no-untyped-def]
    q,
    a,
    weight,
    scale,
    bias,
    residual,
    y,
    partials,
    arrived,
    tokens,
    outputs,
    input_tiles,
    tiles_per_part,
    parts,
    splits,
    HAS_NIBBLES: tl.constexpr,  # noqa: N803
    OFFSETS: tl.constexpr,  # noqa: N803
    PLANES: tl.constexpr,  # noqa: N803
    BIAS: tl.constexpr,  # noqa: N803
    RESIDUAL: tl.constexpr,  # noqa: N803
    GATE: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Y float32 [T, outputs] of q int8 [T, input_tiles · INPUTS] and a float32 [T, input_tiles · INPUTS / 32].

    Programs: (tile of tokens, tile of outputs, split): one for all `parts`, or with `splits` = `parts` one for each.
    `weight`: packed tiles (plugins.gpu.packing); `scale` [tiles, blocks, OUTPUTS], float32, or float16 with
    HAS_NIBBLES, and with OFFSETS [tiles, blocks, 2, OUTPUTS]. With PLANES, q is [T, 2, input_tiles · INPUTS].
    `bias` float32 in the order of outputs. GATE as in `w8a8_linear`. `partials` float32: where splits leave their
    parts; `arrived` int32, zeros before and after: the last to arrive goes on.
    """
    token_tile, output_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    output = tl.arange(0, OUTPUTS)
    k = tl.arange(0, _INPUTS)
    halves: tl.constexpr = 2 if GATE else 1
    blocks_of_unit: tl.constexpr = 2 if HAS_NIBBLES else 1
    units_of_tile: tl.constexpr = INPUTS // (_INPUTS * blocks_of_unit)
    unit_bytes: tl.constexpr = OUTPUTS * _INPUTS
    inputs, units = input_tiles * INPUTS, input_tiles * units_of_tile
    blocks = units * blocks_of_unit
    scales: tl.constexpr = 2 * OUTPUTS if OFFSETS else OUTPUTS
    planes: tl.constexpr = 2 if PLANES else 1
    base = weight + output_tile.to(tl.int64) * halves * units * unit_bytes
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    inside = token[None, :] < tokens
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    total_ups = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    begin = tl.where(splits > 1, split, 0)
    end = tl.where(splits > 1, split + 1, parts)
    for part in range(begin, end):
        first = part * tiles_per_part * units_of_tile
        last = tl.minimum(first + tiles_per_part * units_of_tile, units)
        at_weight = base + first * unit_bytes + output[:, None] * _INPUTS + k[None, :]
        block = first * blocks_of_unit
        at_q = q + token[None, :].to(tl.int64) * (planes * inputs) + block * _INPUTS + k[:, None]
        at_scale = scale + (output_tile.to(tl.int64) * halves * blocks + block) * scales + output
        at_amax = a + token[None, :].to(tl.int64) * blocks + block
        result = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        ups = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        for _ in range(first, last):
            result = add_unit(
                result, at_weight, at_q, at_scale, at_amax, inside, inputs, HAS_NIBBLES, OFFSETS, PLANES, OUTPUTS
            )
            if GATE:
                at_up, at_ups = at_weight + units.to(tl.int64) * unit_bytes, at_scale + blocks * scales
                ups = add_unit(ups, at_up, at_q, at_ups, at_amax, inside, inputs, HAS_NIBBLES, OFFSETS, PLANES, OUTPUTS)
            at_weight += unit_bytes
            at_q += blocks_of_unit * _INPUTS
            at_scale += blocks_of_unit * scales
            at_amax += blocks_of_unit
        total += result
        if GATE:
            total_ups += ups
    tile = token_tile * tl.num_programs(1) + output_tile
    size: tl.constexpr = OUTPUTS * TOKENS
    at_part = partials + tile.to(tl.int64) * halves * splits * size + output[:, None] * TOKENS
    at_part += tl.arange(0, TOKENS)[None, :]
    before = 0
    if splits > 1:
        tl.store(at_part + split * halves * size, total)
        if GATE:
            tl.store(at_part + (split * halves + 1) * size, total_ups)
        # Every thread's parts are there before this program counts as arrived.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        tl.debug_barrier()
    if before == splits - 1:
        if splits > 1:
            total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
            total_ups = tl.zeros((OUTPUTS, TOKENS), tl.float32)
            for part in range(splits):
                # Past the cache of this multiprocessor, which may hold what was there before.
                total += tl.load(at_part + part * halves * size, cache_modifier=".cg")
                if GATE:
                    total_ups += tl.load(at_part + (part * halves + 1) * size, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
        channel = output_tile * halves * OUTPUTS + output
        if BIAS:
            total = total + tl.load(bias + channel)[:, None]
        if GATE:
            if BIAS:
                total_ups = total_ups + tl.load(bias + channel + OUTPUTS)[:, None]
            exponent = -total
            if GATE == _GELU_TANH:
                exponent = total * (total * total * _GELU_CUBE + _GELU_X)
            total = total / (1.0 + tl.exp(exponent)) * total_ups
        column = output_tile * OUTPUTS + output
        at_y = token[None, :].to(tl.int64) * outputs + column[:, None]
        written = inside & (column[:, None] < outputs)
        if RESIDUAL:
            total = tl.load(residual + at_y, mask=written, other=0.0) + total
        tl.store(y + at_y, total, mask=written)


def kernel_for(variant: BlockLinear) -> Kernel:
    """The kernel of a variant."""
    pointers = operand_types(variant.form)
    pointers |= dict.fromkeys(("bias", "residual", "y", "partials"), "*fp32")
    pointers |= {"arrived": "*i32"}
    numbers = dict.fromkeys(("tokens", "outputs", "input_tiles", "tiles_per_part", "parts", "splits"), "i32")
    return Kernel(
        name=variant.name,
        function=block_linear,
        overlaps=True,
        signature={**pointers, **numbers},
        constants={
            **form_constants(variant.form),
            "BIAS": int(variant.bias),
            "RESIDUAL": int(variant.residual),
            "GATE": GATES.index(variant.gate),
            "TOKENS": variant.tokens,
            "OUTPUTS": TILE_OUTPUTS,
            "INPUTS": TILE_INPUTS,
        },
        num_warps=8 if FORMS[variant.form].planes else 4,
        num_stages=4,
        aligned=tuple(pointers),
    )


def operand_types(form: str) -> dict[str, str]:
    """Triton's types of what a linear multiplies."""
    return {"q": "*i8", "a": "*fp32", "weight": "*i8", "scale": "*fp16" if FORMS[form].nibbles else "*fp32"}


def form_constants(form: str) -> dict[str, int]:
    """What tells the forms apart."""
    of_form = FORMS[form]
    return {"HAS_NIBBLES": int(of_form.nibbles), "OFFSETS": int(of_form.offsets), "PLANES": int(of_form.planes)}
