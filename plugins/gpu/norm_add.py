"""norm_add as a Triton kernel: the RMS norm after a linear, and the sum with the residual stream.

One program holds one token, as in norm_quantize: its bits do not depend on how many are fed.
"""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel
from plugins.gpu.rms_norm import rms_norm
from plugins.gpu.variants import NormAdd


def norm_add(  # type: ignore[no-untyped-def]
    x,
    weight,
    residual,
    y,
    columns,
    epsilon,
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Token `program_id(0)` of y float32 [T, columns] = residual + x / sqrt(mean(x²) + epsilon) · weight."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * columns
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row + offsets, mask=inside, other=0.0)
    normed = rms_norm(values, weight + offsets, inside, columns, epsilon)
    before = tl.load(residual + row + offsets, mask=inside, other=0.0)
    tl.store(y + row + offsets, before + normed, mask=inside)


def kernel_for(variant: NormAdd) -> Kernel:
    """The kernel of a variant."""
    pointers = dict.fromkeys(("x", "weight", "residual", "y"), "*fp32")
    return Kernel(
        name=variant.name,
        function=norm_add,
        overlaps=True,
        signature={**pointers, "columns": "i32", "epsilon": "fp32"},
        constants={"BLOCK": variant.block},
        num_warps=min(32, max(1, variant.block // 128)),
        aligned=(*pointers, *(["columns"] if variant.aligned else [])),
    )
