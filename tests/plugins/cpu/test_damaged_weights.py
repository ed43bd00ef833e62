"""Packed weights that lie: whatever came, an operator says what is wrong, or computes within its memory.

`make test-native` runs this under AddressSanitizer, where a read beyond a tensor ends the process.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.cpu.packing import pack_block_scales, pack_nibbles, pack_weight
from plugins.w8a8_linear import GELU, NO_GATE, SILU
from quasar.numerics import BLOCK
from tests.plugins.cpu.operators import LEVELS, needs_library, run_operator

pytestmark = needs_library
OPERATORS = ("W8A8Linear", "W8A8BlockLinear", "W4A8BlockLinear", "W4A16BlockLinear")
FUZZED = settings(deadline=None, max_examples=150, database=None, derandomize=True)
# Inputs of the node by name, in order.
PARTS = ("x", "packed", "scale", "bias", "residual", "norm")


def whole(random, operator, *, rows, outputs, inputs, group, gate, offsets):
    """A node that fits: its inputs, and its attributes."""
    columns, gated = 2 * outputs if gate != NO_GATE else outputs, gate != NO_GATE
    if operator == "W8A8Linear":
        packed = pack_weight(random.integers(-127, 128, (columns, inputs)).astype(np.int8), gated=gated)
        scale = random.random(columns, np.float32)
    elif operator == "W8A8BlockLinear":
        packed = pack_weight(random.integers(-127, 128, (columns, inputs)).astype(np.int8), gated=gated, blocks=True)
        scale = pack_block_scales(random.random((columns, inputs // BLOCK), np.float32), gated=gated)
    else:
        packed = pack_nibbles(random.integers(-8, 8, (columns, inputs)).astype(np.int8), gated=gated)
        halves = random.random((columns, -(-inputs // group))).astype(np.float16)
        scale = np.concatenate([pack_block_scales(halves, gated=gated)] * (2 if offsets else 1), axis=2)
    tensors = {
        "x": random.standard_normal((rows, inputs), np.float32),
        "packed": packed,
        "scale": scale,
        "bias": random.random(columns, np.float32),
        "residual": random.random((rows, outputs), np.float32),
        "norm": random.random(inputs, np.float32),
    }
    attributes = {"outputs": outputs, "gate": gate, "epsilon": 1e-5}
    if operator.startswith("W4"):
        attributes |= {"group_size": group, "offsets": int(offsets)}
    return tensors, attributes


def damage(random, tensors, attributes, kind):
    """One lie: about an attribute, about a tensor's extents, or in its bytes."""
    if kind == "attribute":
        name = random.choice([name for name in attributes if name != "epsilon"])
        attributes[name] = int(random.choice([-1, 0, 1, 2, 31, 33, 64, 96, 128, 4096, 65536, 1 << 30, 1 << 40]))
        return
    name = random.choice(PARTS)
    tensor = tensors[name]
    if kind == "bytes":
        content = random.integers(0, 256, tensor.nbytes).astype(np.uint8)
        tensors[name] = content.view(tensor.dtype).reshape(tensor.shape)
        return
    axis = int(random.integers(tensor.ndim))
    extent = int(random.choice([0, 1, max(0, tensor.shape[axis] - 1), tensor.shape[axis] + 1, 2 * tensor.shape[axis]]))
    tensors[name] = np.resize(tensor, (*tensor.shape[:axis], extent, *tensor.shape[axis + 1 :]))


@pytest.mark.parametrize("operator", OPERATORS)
@FUZZED
@given(
    rows=st.integers(1, 9),
    outputs=st.sampled_from([1, 16, 31, 33, 64]),
    inputs=st.sampled_from([32, 64, 160]),
    group=st.sampled_from([32, 64, 128]),
    gate=st.sampled_from([NO_GATE, SILU, GELU]),
    offsets=st.booleans(),
    lies=st.lists(st.sampled_from(["attribute", "extents", "bytes"]), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_lies_are_told_or_harmless(operator, rows, outputs, inputs, group, gate, offsets, lies, seed):
    random = np.random.default_rng(seed)
    tensors, attributes = whole(
        random, operator, rows=rows, outputs=outputs, inputs=inputs, group=group, gate=gate, offsets=offsets
    )
    for kind in lies:
        damage(random, tensors, attributes, kind)
    parts = [tensors[name] for name in PARTS]
    said = ""
    try:
        [y] = run_operator(operator, parts, attributes, level=LEVELS[0])
    except Exception as error:
        said = str(error)
    if said:
        assert f"{operator}: " in said
        return
    # What was computed has the extents that were asked for, whatever numbers came in.
    assert y.shape == (*tensors["x"].shape[:-1], attributes["outputs"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_fits_is_computed(operator):
    """Else the lies above would be told for another reason."""
    for gate in (NO_GATE, SILU, GELU):
        for offsets in (False, True):
            tensors, attributes = whole(
                np.random.default_rng(0), operator, rows=3, outputs=33, inputs=160, group=64, gate=gate, offsets=offsets
            )
            [y] = run_operator(operator, [tensors[name] for name in PARTS], attributes, level=LEVELS[0])
            assert y.shape == (3, 33)
            assert np.isfinite(y).all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["scale", "bias", "norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(operator, name, value):
    tensors, attributes = whole(
        np.random.default_rng(0),
        operator,
        rows=3,
        outputs=33,
        inputs=160,
        group=64,
        gate=SILU,
        offsets=operator.startswith("W4"),
    )
    weights = [PARTS.index(part) for part in ("packed", "scale", "bias", "norm")]

    def run():
        return run_operator(operator, [tensors[part] for part in PARTS], attributes, level=LEVELS[0], constant=weights)

    [y] = run()
    assert np.isfinite(y).all()
    tensors[name].reshape(-1)[-1] = value
    with pytest.raises(Exception, match=f"{operator}: {name} has values that are not finite"):
        run()


def test_weights_that_are_absent_are_not_asked_for():
    tensors, attributes = whole(
        np.random.default_rng(0),
        "W4A8BlockLinear",
        rows=1,
        outputs=16,
        inputs=32,
        group=32,
        gate=NO_GATE,
        offsets=False,
    )
    parts = [tensors["x"], tensors["packed"], tensors["scale"], None, None, None]
    [y] = run_operator("W4A8BlockLinear", parts, attributes, level=LEVELS[0], constant=[1, 2])
    assert np.isfinite(y).all()
