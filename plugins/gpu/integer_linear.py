"""integer_linear as a Triton kernel: a TensorRT plugin launches it, so it needs no memory that was zeroed before.

The same tiles and the same exact sums as `plugins.gpu.w8a8_linear`, without splits of the inputs and what follows them.
"""

import triton.language as tl

from plugins.gpu.kernel import Kernel
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS
from quasar import numerics

_UNIT_STEP = tl.constexpr(numerics.UNIT_STEP)
# Tokens of a tile: the widest verify pass reads each weight once. 64 would need more shared memory than a launch gets
# without asking for it.
TOKENS = 32


def integer_linear(  # type: ignore[no-untyped-def]
    q,
    a,
    weight,
    scale,
    bias,
    tokens,
    inputs,
    outputs,
    y,
    TOKENS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
):
    """Y float32 [tokens, outputs] of q int8 [tokens, inputs], a float32 [tokens], scale and bias float32 [outputs].

    Programs: (tile of tokens, tile of outputs). `inputs`: a multiple of 16; `weight`: packed tiles
    (plugins.gpu.packing), with zeros after the last input. The arguments' order is a
    TensorRT plugin's: inputs, numbers, outputs.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.arange(0, OUTPUTS)
    k = tl.arange(0, INPUTS)
    input_tiles = (inputs + INPUTS - 1) // INPUTS
    at_weight = weight + tl.program_id(1).to(tl.int64) * input_tiles * (OUTPUTS * INPUTS)
    at_weight += output[:, None] * INPUTS + k[None, :]
    at_q = q + token[None, :].to(tl.int64) * inputs + k[:, None]
    inside = token[None, :] < tokens
    product = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    for first in range(0, inputs, INPUTS):
        # The next row begins where this one ends.
        x = tl.load(at_q, mask=inside & (k[:, None] < inputs - first), other=0)
        # Weights that are read once should not push activations out of the cache.
        product = tl.dot(tl.load(at_weight, eviction_policy="evict_first"), x, product, out_dtype=tl.int32)
        at_weight += OUTPUTS * INPUTS
        at_q += INPUTS
    column = tl.program_id(1) * OUTPUTS + output
    has_column = column < outputs
    amax = tl.load(a + token, mask=token < tokens, other=0.0)[None, :]
    step = tl.load(scale + column, mask=has_column, other=0.0) * _UNIT_STEP
    # The reference's order: product · (1/127 · scale) · a, then the bias.
    result = product.to(tl.float32) * step[:, None] * amax
    result = result + tl.load(bias + column, mask=has_column, other=0.0)[:, None]
    tl.store(y + token[None, :].to(tl.int64) * outputs + column[:, None], result, mask=inside & has_column[:, None])


KERNEL = Kernel(
    function=integer_linear,
    signature={
        **{name: "*i8" if name in ("q", "weight") else "*fp32" for name in ("q", "a", "weight", "scale", "bias")},
        **dict.fromkeys(("tokens", "inputs", "outputs"), "i32"),
        "y": "*fp32",
    },
    constants={"TOKENS": TOKENS, "OUTPUTS": TILE_OUTPUTS, "INPUTS": TILE_INPUTS},
    num_warps=4,
    num_stages=4,
    aligned=("q", "a", "weight", "scale", "bias", "inputs", "y"),
)
