"""Linears with 4-bit weights: weights and offsets that come, and the operator over packed ones."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from plugins.cpu.packing import pack_block_scales, pack_nibbles
from plugins.w8a8_linear import NO_GATE
from quasar.numerics import BLOCK
from tests.plugins.cpu.operators import run_operator

QUICK = settings(deadline=None, max_examples=40, database=None, derandomize=True)
GROUPS = (BLOCK, 2 * BLOCK, 4 * BLOCK)
SHAPES = {
    "rows": st.integers(1, 40),
    "outputs": st.sampled_from([1, 15, 16, 17, 31, 32, 33, 65, 100]),
    "group": st.sampled_from(GROUPS),
    "seed": st.integers(0, 2**31),
}


def nibble_linear(
    operator, x, values, scale, *, level, group, gate=NO_GATE, threads=1, epsilon=0.0, offset=None, **optional
):
    """With an offset, values are from 0 to 15."""
    gated = gate != NO_GATE
    packed = pack_nibbles(values if offset is None else values - np.int8(8), gated=gated)
    parts = [scale] if offset is None else [scale, offset]
    scales = np.concatenate([pack_block_scales(part, gated=gated) for part in parts], axis=2)
    inputs = [x, packed, scales, *(optional.get(name) for name in ("bias", "residual", "norm"))]
    attributes = {
        "outputs": len(values) // 2 if gated else len(values),
        "gate": gate,
        "epsilon": float(epsilon),
        "group_size": group,
        "offsets": int(offset is not None),
    }
    return run_operator(operator, inputs, attributes, level=level, threads=threads)[0]


def by_block(halves, group, inputs):
    """Scales or offsets of groups, float16 [N, groups] → those of blocks, float32 [N, blocks]."""
    blocks = -(-inputs // BLOCK)
    return np.repeat(halves.astype(np.float32), group // BLOCK, axis=1)[:, :blocks]


def weights(random, outputs, inputs, group):
    values = random.integers(-8, 8, (outputs, inputs)).astype(np.int8)
    # Whole columns of one extreme: where 16-bit sums are largest.
    values[random.random(outputs) < 0.2] = random.choice([-8, 7])
    scale = random.uniform(1e-3, 0.02, (outputs, -(-inputs // group))).astype(np.float16)
    return values, scale


def with_offsets(random, values, scale):
    """Values from 0 to 15, and offsets that bring most weights back around zero."""
    return values + np.int8(8), (-8 * scale * random.uniform(0.5, 1.5, scale.shape)).astype(np.float16)
