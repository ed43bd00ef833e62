"""rotate_append as a Triton kernel: q/k norms, rotation, queries, keys and values to the cache."""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel, optional_arguments
from plugins.gpu.variants import TRITON_TYPES, RotateAppend, power_of_2
from quasar import numerics

_QMAX = tl.constexpr(float(numerics.QMAX))


def rotate_append(  # type: ignore[no-untyped-def]
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    positions,
    destinations,
    slots,
    queries,
    keys,
    values,
    heads,
    kv_heads,
    capacity,
    epsilon,
    key_scale,
    value_scale,
    INT8: tl.constexpr,  # noqa: N803
    NORM: tl.constexpr,  # noqa: N803
    ROW: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    ROTARY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Head `program_id(1)` of token `program_id(0)` of qkv float32 [T, (H + 2G) · SIZE]: queries, keys, then values.

    `positions` int32 [T] are rows of `cos` and `sin` float32 [positions, ROTARY / 2], which rotate the first ROTARY
    values of a head; `destinations` int32 [T] and `slots` int32 [T] say where in the caches [slots, G, S, SIZE] keys
    and values go: with a destination of -1 nowhere. `queries` is float32 [T, H, SIZE]. With NORM, an RMS norm over a
    head comes first, with `q_norm` and `k_norm` float32 [SIZE]; where ROW is not 0, one over all query heads, or all
    keys, of a token together: up to ROW values, with `q_norm` [H · SIZE] and `k_norm` [G · SIZE]. ROTARY 0: nothing is
    rotated. With INT8 caches hold integers from -127 to 127, each times `key_scale` or `value_scale` float32 [G, SIZE].
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < SIZE
    half: tl.constexpr = ROTARY // 2
    rotated = offsets < ROTARY
    # The value that an element is rotated with: the other half's at the same place.
    partner = tl.where(offsets < half, offsets + half, offsets - half)
    row = qkv + (token * (heads + 2 * kv_heads) + head) * SIZE
    x = tl.load(row + offsets, mask=inside, other=0.0)
    other = tl.load(row + partner, mask=rotated, other=0.0)
    if NORM:
        weight = q_norm if head < heads else k_norm
        if head < heads + kv_heads:
            squares = x * x
            size = tl.full((), SIZE, tl.float32)
            if ROW:
                # Every head's program sums the whole row, in the one order: no program waits for another.
                first = 0 if head < heads else heads
                count = (heads if head < heads else kv_heads) * SIZE
                wide = tl.arange(0, ROW)
                whole = tl.load(row + (first - head) * SIZE + wide, mask=wide < count, other=0.0)
                squares = whole * whole
                size = count.to(tl.float32)
                weight += (head - first) * SIZE
            norm = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), size) + epsilon)
            x = tl.div_rn(x, tl.zeros_like(x) + norm) * tl.load(weight + offsets, mask=inside, other=0.0)
            other = tl.div_rn(other, tl.zeros_like(x) + norm) * tl.load(weight + partner, mask=rotated, other=0.0)
    if (ROTARY > 0) & (head < heads + kv_heads):
        angle = tl.load(positions + token).to(tl.int64) * half + tl.where(offsets < half, offsets, offsets - half)
        c, s = tl.load(cos + angle, mask=rotated, other=1.0), tl.load(sin + angle, mask=rotated, other=0.0)
        x = tl.where(offsets < half, x * c - other * s, x * c + other * s)
    if head < heads:
        at_query = queries + (token * heads + head) * SIZE
        tl.store(at_query + offsets, x, mask=inside)
    else:
        group = head - heads
        target, scale = keys, key_scale
        if group >= kv_heads:
            group = group - kv_heads
            target, scale = values, value_scale
        if INT8:
            steps = tl.div_rn(x, tl.load(scale + group * SIZE + offsets, mask=inside, other=1.0))
            # Rounded to even, as in norm_quantize.
            x = (tl.minimum(tl.maximum(steps, -_QMAX), _QMAX) + 12582912.0) - 12582912.0
        slot, destination = tl.load(slots + token).to(tl.int64), tl.load(destinations + token)
        if destination >= 0:
            at_cache = target + ((slot * kv_heads + group) * capacity + destination) * SIZE
            tl.store(at_cache + offsets, x.to(keys.dtype.element_ty), mask=inside)


def kernel_for(variant: RotateAppend) -> Kernel:
    """The kernel of a variant."""
    floats = dict.fromkeys(("qkv", "cos", "sin", "q_norm", "k_norm"), "*fp32")
    integers = dict.fromkeys(("positions", "destinations", "slots"), "*i32")
    caches = dict.fromkeys(("keys", "values"), f"*{TRITON_TYPES[variant.cache_type]}")
    numbers = {"heads": "i32", "kv_heads": "i32", "capacity": "i32", "epsilon": "fp32"}
    in_int8 = variant.cache_type == "int8"
    scales, unused = optional_arguments(["key_scale", "value_scale"], "*fp32", taken=in_int8)
    return Kernel(
        name=variant.name,
        function=rotate_append,
        overlaps=True,
        signature={**floats, **integers, "queries": "*fp32", **caches, **numbers, **scales},
        constants={
            **unused,
            "INT8": int(in_int8),
            "NORM": int(variant.norm),
            "ROW": variant.row,
            "SIZE": variant.head_size,
            "ROTARY": variant.rotary,
            "BLOCK": power_of_2(variant.head_size),
        },
        # A row has thousands of values, a head a few for each thread of a warp.
        num_warps=min(8, max(1, variant.row // 512)),
        aligned=(*floats, *integers, "queries", *caches),
    )
