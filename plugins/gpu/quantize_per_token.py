"""quantize_per_token as a Triton kernel: one program per row, two sweeps over it."""

import triton.language as tl

from plugins.gpu.kernel import Kernel
from quasar import numerics

_AMAX_FLOOR = tl.constexpr(numerics.AMAX_FLOOR)
_UNIT_STEP = tl.constexpr(numerics.UNIT_STEP)
# Elements that one sweep step reads.
BLOCK = 1024


def quantize_per_token(x, columns, row_stride, q, a, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The row `program_id(0)` of x [T, columns] to int8 q [T, columns] and float32 a [T].

    The arguments' order is a TensorRT plugin's: inputs, numbers, outputs.
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        values = tl.load(x + row * row_stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    amax = tl.maximum(tl.max(largest, axis=0), _AMAX_FLOOR)
    tl.store(a + row, amax)
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        values = tl.load(x + row * row_stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
        # Divisions as IEEE has them; the graph divides by the float32 next to 1/127.
        unit = tl.div_rn(values, tl.zeros_like(values) + amax)
        steps = tl.div_rn(unit, tl.zeros_like(values) + _UNIT_STEP)
        # Adding 1.5 * 2^23 leaves no bits below the unit: the sum is rounded to even, as QuantizeLinear rounds.
        rounded = (steps + 12582912.0) - 12582912.0
        tl.store(q + row * columns + start + offsets, rounded.to(tl.int8), mask=inside)


def _kernel(x_type: str) -> Kernel:
    return Kernel(
        function=quantize_per_token,
        signature={"x": f"*{x_type}", "columns": "i32", "row_stride": "i32", "q": "*i8", "a": "*fp32"},
        constants={"BLOCK": BLOCK},
        num_warps=4,
    )


KERNELS = {"float16": _kernel("fp16"), "bfloat16": _kernel("bf16"), "float32": _kernel("fp32")}
