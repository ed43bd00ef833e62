"""w8a8_linear as a Triton kernel: INT8 tensor cores with the weights as the long side, and everything after them.

Products are summed in int32, which is exact: a token's bits do not depend on the tile, on how many tokens are fed, or
on how the inputs are split over programs.
"""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS
from plugins.gpu.variants import GATES, W8A8Linear
from quasar import numerics

_UNIT_STEP = tl.constexpr(numerics.UNIT_STEP)
_SILU, _GELU_TANH = tl.constexpr(GATES.index("silu")), tl.constexpr(GATES.index("gelu_tanh"))
# -2 sqrt(2 / pi), and that times 0.044715: gelu's tanh of u is of these factors on x and x³, by -2u.
_GELU_X, _GELU_CUBE = tl.constexpr(-1.5957691216057308), tl.constexpr(-0.07135481282731867)


def w8a8_linear(  # type: ignore[no-untyped-def]
    q,
    a,
    weight,
    scale,
    bias,
    residual,
    y,
    sums,
    arrived,
    tokens,
    outputs,
    input_tiles,
    tiles_per_split,
    splits,
    BIAS: tl.constexpr,  # noqa: N803
    RESIDUAL: tl.constexpr,  # noqa: N803
    GATE: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Y float32 [T, outputs] of q int8 [T, input_tiles · INPUTS] and a float32 [T].

    Programs: (tile of tokens, tile of outputs, split of the inputs): those that read the same weights run side by side.
    `weight`: packed tiles (plugins.gpu.packing); `scale` and `bias` float32 in their order. GATE: the place in
    `GATES`; where it is not 0, a tile of gates and a tile of ups give silu(gate) · up or gelu(gate) · up. `sums` int32
    and `arrived` int32, zeros before and after: where splits add up; the last to arrive goes on.
    """
    token_tile, output_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    output = tl.arange(0, OUTPUTS)
    k = tl.arange(0, INPUTS)
    parts: tl.constexpr = 2 if GATE else 1
    # Weights that are read once should not push activations out of the cache.
    policy: tl.constexpr = "evict_first" if TOKENS <= 32 else ""
    inputs = input_tiles * INPUTS
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, input_tiles)
    tile_bytes: tl.constexpr = OUTPUTS * INPUTS
    base = weight + (output_tile.to(tl.int64) * parts * input_tiles + first) * tile_bytes
    if OVERLAP:
        gdc_launch_dependents()
        # Weights do not depend on the kernel before: their first lines come while that one ends.
        line = tl.minimum(tl.arange(0, 256) * 128, (last - first) * tile_bytes - 128)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [base + line], tl.int32, is_pure=False, pack=1
        )
        gdc_wait()
    at_weight = base + output[:, None] * INPUTS + k[None, :]
    at_q = q + token[None, :].to(tl.int64) * inputs + first * INPUTS + k[:, None]
    inside = token[None, :] < tokens
    product = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    ups = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    for _ in range(first, last):
        x = tl.load(at_q, mask=inside, other=0)
        product = tl.dot(tl.load(at_weight, eviction_policy=policy), x, product, out_dtype=tl.int32)
        if GATE:
            up = tl.load(at_weight + input_tiles.to(tl.int64) * tile_bytes, eviction_policy=policy)
            ups = tl.dot(up, x, ups, out_dtype=tl.int32)
        at_weight += tile_bytes
        at_q += INPUTS
    tile = token_tile * tl.num_programs(1) + output_tile
    at_sums = sums + (tile.to(tl.int64) * parts * OUTPUTS + output[:, None]) * TOKENS + tl.arange(0, TOKENS)[None, :]
    # Loaded before the splits wait for each other.
    channel = output_tile * parts * OUTPUTS + output
    amax = tl.load(a + token, mask=token < tokens, other=0.0)[None, :]
    step = tl.load(scale + channel) * _UNIT_STEP
    before = 0
    if splits > 1:
        tl.atomic_add(at_sums, product, mask=inside, sem="relaxed")
        if GATE:
            tl.atomic_add(at_sums + OUTPUTS * TOKENS, ups, mask=inside, sem="relaxed")
        # Every thread's additions come before this program counts as arrived.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        tl.debug_barrier()
    if before == splits - 1:
        if splits > 1:
            zeros = tl.zeros((OUTPUTS, TOKENS), tl.int32)
            product = tl.atomic_xchg(at_sums, zeros, mask=inside, sem="relaxed")
            if GATE:
                ups = tl.atomic_xchg(at_sums + OUTPUTS * TOKENS, zeros, mask=inside, sem="relaxed")
            tl.store(arrived + tile, 0)
        # The reference's order: product · (1/127 · scale) · a, then the bias.
        result = product.to(tl.float32) * step[:, None] * amax
        if BIAS:
            result = result + tl.load(bias + channel)[:, None]
        if GATE:
            up = ups.to(tl.float32) * (tl.load(scale + channel + OUTPUTS) * _UNIT_STEP)[:, None] * amax
            if BIAS:
                up = up + tl.load(bias + channel + OUTPUTS)[:, None]
            # gelu with tanh is x (1 + tanh u) / 2 = x / (1 + e^-2u): no function but e^x, and no digits lost where tanh
            # is near -1.
            exponent = -result
            if GATE == _GELU_TANH:
                exponent = result * (result * result * _GELU_CUBE + _GELU_X)
            # e^x of a very negative gate is infinite, and gate / infinity is the zero that it should be.
            result = result / (1.0 + tl.exp(exponent)) * up
        column = output_tile * OUTPUTS + output
        at_y = token[None, :].to(tl.int64) * outputs + column[:, None]
        written = inside & (column[:, None] < outputs)
        if RESIDUAL:
            result = tl.load(residual + at_y, mask=written, other=0.0) + result
        tl.store(y + at_y, result, mask=written)


def kernel_for(variant: W8A8Linear) -> Kernel:
    """The kernel of a variant."""
    pointers = {"q": "*i8", "a": "*fp32", "weight": "*i8"}
    pointers |= dict.fromkeys(("scale", "bias", "residual", "y"), "*fp32")
    pointers |= {"sums": "*i32", "arrived": "*i32"}
    numbers = dict.fromkeys(("tokens", "outputs", "input_tiles", "tiles_per_split", "splits"), "i32")
    return Kernel(
        name=variant.name,
        function=w8a8_linear,
        overlaps=True,
        signature={**pointers, **numbers},
        constants={
            "BIAS": int(variant.bias),
            "RESIDUAL": int(variant.residual),
            "GATE": GATES.index(variant.gate),
            "TOKENS": variant.tokens,
            "OUTPUTS": TILE_OUTPUTS,
            "INPUTS": TILE_INPUTS,
        },
        num_warps=4,
        num_stages=4,
        aligned=tuple(pointers),
    )
