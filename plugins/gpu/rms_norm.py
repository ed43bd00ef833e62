"""The RMS norm of a row, as Triton kernels that hold a whole row compute it."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(values, at_weight, inside, columns, epsilon):  # type: ignore[no-untyped-def]
    """Float32 [BLOCK]: values / sqrt(mean(values²) + epsilon) · weight.

    `at_weight`: pointers to the weight of each value. Only the first `columns` are `inside`; the others are zeros.
    """
    mean = tl.div_rn(tl.sum(values * values, axis=0), columns.to(tl.float32))
    norm = tl.sqrt_rn(mean + epsilon)
    # Divisions as IEEE has them.
    return tl.div_rn(values, tl.zeros_like(values) + norm) * tl.load(at_weight, mask=inside, other=0.0)
