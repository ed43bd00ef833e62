"""norm_quantize as a Triton kernel: the RMS norm before a W8A8 linear and the quantization of its tokens, in one pass.

One program holds one token, so a token's bits do not depend on how many are fed. The norm's sum is Triton's reduction
of `BLOCK` values, in an order that is fixed when the kernel is compiled.
"""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel
from plugins.gpu.rms_norm import rms_norm
from plugins.gpu.variants import NormQuantize
from quasar import numerics

_AMAX_FLOOR = tl.constexpr(numerics.AMAX_FLOOR)
_UNIT_STEP, _WIDE_STEP = tl.constexpr(numerics.UNIT_STEP), tl.constexpr(numerics.WIDE_STEP)


def norm_quantize(  # type: ignore[no-untyped-def]
    x,
    weight,
    q,
    a,
    columns,
    stride,
    epsilon,
    NORM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PLANES: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Token `program_id(0)` of x float32 [T, columns] → q int8 [T, stride] and a float32 [T], or [T, stride / GROUP].

    With NORM, what is quantized is x / sqrt(mean(x²) + epsilon) · weight. `stride` is `columns` rounded up to what the
    linear reads at a time; the values between are zeros. GROUP: values that share an amax; 0: all of a token. Where one
    of them is not finite, a = NaN.

    With PLANES, q is int8 [T, 2, stride]: integers of 16 bits as 256 times the first, and the second.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + token * columns + offsets, mask=inside, other=0.0)
    if NORM:
        values = rms_norm(values, weight + offsets, inside, columns, epsilon)
    size: tl.constexpr = GROUP if GROUP else BLOCK
    groups: tl.constexpr = BLOCK // size
    values = tl.reshape(values, (groups, size))
    finite = tl.abs(values) < float("inf")
    amax = tl.maximum(tl.max(tl.where(finite, tl.abs(values), 0.0), axis=1), _AMAX_FLOOR)
    whole = tl.min(finite.to(tl.int32), axis=1) == 1
    # Divisions as IEEE has them; the graph divides by the float32 next to 1/127.
    unit = tl.div_rn(tl.where(whole[:, None] & finite, values, 0.0), tl.zeros_like(values) + amax[:, None])
    step: tl.constexpr = _WIDE_STEP if PLANES else _UNIT_STEP
    steps = tl.div_rn(unit, tl.zeros_like(values) + step)
    # Adding 1.5 * 2^23 leaves no bits below the unit: the sum is rounded to even, as QuantizeLinear rounds.
    rounded = tl.reshape((steps + 12582912.0) - 12582912.0, (BLOCK,))
    if PLANES:
        integers = rounded.to(tl.int32)
        high = (integers + 128) >> 8
        at_q = q + token * (2 * stride) + offsets
        tl.store(at_q, high.to(tl.int8), mask=offsets < stride)
        tl.store(at_q + stride, (integers - high * 256).to(tl.int8), mask=offsets < stride)
    else:
        tl.store(q + token * stride + offsets, rounded.to(tl.int8), mask=offsets < stride)
    group = tl.arange(0, groups)
    stored = group < stride // size if GROUP else group < 1
    at_amax = a + token * (stride // size) if GROUP else a + token
    tl.store(at_amax + group, tl.where(whole, amax, float("nan")), mask=stored)


def kernel_for(variant: NormQuantize) -> Kernel:
    """The kernel of a variant."""
    return Kernel(
        name=variant.name,
        function=norm_quantize,
        overlaps=True,
        signature={
            "x": "*fp32",
            "weight": "*fp32",
            "q": "*i8",
            "a": "*fp32",
            "columns": "i32",
            "stride": "i32",
            "epsilon": "fp32",
        },
        constants={
            "NORM": int(variant.norm),
            "BLOCK": variant.block,
            "GROUP": numerics.BLOCK if variant.in_blocks else 0,
            "PLANES": int(variant.planes),
        },
        num_warps=min(32, max(1, variant.block // 128)),
        aligned=("x", "weight", "q", "stride", *(["columns"] if variant.aligned else [])),
    )
