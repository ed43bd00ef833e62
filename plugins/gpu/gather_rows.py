"""gather_rows as a Triton kernel: rows of a table as float32, for the embedding and the LM head's positions."""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel
from plugins.gpu.variants import COLUMNS, TRITON_TYPES, GatherRows


def gather_rows(  # type: ignore[no-untyped-def]
    table,
    indices,
    y,
    columns,
    scale,
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Row `program_id(0)` of y float32 [M, columns] is row `indices`[that], int32 [M], of `table` [rows, columns].

    It is multiplied by `scale` in float32: by 1, which changes no bit, where nothing is scaled.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    source = tl.load(indices + row).to(tl.int64) * columns
    values = tl.load(table + source + offsets, mask=inside).to(tl.float32) * scale
    tl.store(y + row * columns + offsets, values, mask=inside)


def kernel_for(variant: GatherRows) -> Kernel:
    """The kernel of a variant."""
    return Kernel(
        name=variant.name,
        function=gather_rows,
        overlaps=True,
        signature={
            "table": f"*{TRITON_TYPES[variant.table_type]}",
            "indices": "*i32",
            "y": "*fp32",
            "columns": "i32",
            "scale": "fp32",
        },
        constants={"BLOCK": COLUMNS},
        num_warps=4,
        aligned=("table", "y"),
    )
