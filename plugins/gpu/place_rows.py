"""place_rows as a Triton kernel: rows as columns of wider ones, where a linear reads several tensors side by side.

One program holds one row, as in norm_quantize: its bits do not depend on how many are placed.
"""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel
from plugins.gpu.rms_norm import rms_norm
from plugins.gpu.variants import PlaceRows


def place_rows(  # type: ignore[no-untyped-def]
    x,
    weight,
    y,
    columns,
    first,
    width,
    epsilon,
    NORM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Row `program_id(0)` of x float32 [R, columns] → y float32 [R, width], from column `first` on.

    With NORM, what is placed is x / sqrt(mean(x²) + epsilon) · weight.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row * columns + offsets, mask=inside, other=0.0)
    if NORM:
        values = rms_norm(values, weight + offsets, inside, columns, epsilon)
    tl.store(y + row * width + first + offsets, values, mask=inside)


def kernel_for(variant: PlaceRows) -> Kernel:
    """The kernel of a variant."""
    pointers = dict.fromkeys(("x", "weight", "y"), "*fp32")
    extents = dict.fromkeys(("columns", "first", "width"), "i32")
    return Kernel(
        name=variant.name,
        function=place_rows,
        overlaps=True,
        signature={**pointers, **extents, "epsilon": "fp32"},
        constants={"NORM": int(variant.norm), "BLOCK": variant.block},
        num_warps=min(32, max(1, variant.block // 128)),
        aligned=(*pointers, *(extents if variant.aligned else ())),
    )
