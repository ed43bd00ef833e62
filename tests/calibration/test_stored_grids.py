"""Weights that stay on their checkpoint's grid: what each precision holds, and what is rounded anew."""

import contextlib
import dataclasses

import numpy as np
import pytest

from calibration.precisions.catalog import PRECISIONS, STORED, STORED_FLOATS, precision_of
from calibration.recipe import make_recipe
from calibration.stored_grids import keep_grids, stored_weight
from export.build_options import BuildOptions, choose_precision
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.prequantized.weight import PrequantizedWeight, stacked
from quasar.numerics import dequantize_weight
from tests.prequantized import awq, awq_config, compressed, compressed_config, gptq, gptq_config, save_quantized

_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_W8A8 = compressed_config("int-quantized", _CHANNEL)


def made(groups, lowest, highest, seed=0):
    random = np.random.default_rng(seed)
    return PrequantizedWeight(
        values=random.integers(lowest, highest + 1, (6, 256)).astype(np.int8),
        scale=(random.standard_normal((6, groups)) / 100).astype(np.float16).astype(np.float32),
        form="made",
    )


def first_that_holds(weight):
    return next((name for name, precision in PRECISIONS.items() if precision.held(weight) is not None), None)


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (made(1, -8, 7), "w4a8-128"),
        (made(2, -8, 7), "w4a8-128"),
        (made(4, -8, 7), "w4a8"),
        (made(8, -8, 7), "w4a8"),
        (made(1, -127, 127), "w8a8-token"),
        (made(8, -127, 127), "w8a8-block"),
        (made(4, -16, 15), "w8a8-block"),
        (made(16, -8, 7), None),
    ],
)
def test_the_coarsest_precision_that_holds_a_grid_rounds_nothing(weight, name):
    assert first_that_holds(weight) == name
    if name is not None:
        np.testing.assert_array_equal(dequantize_weight(precision_of(name).held(weight)), weight.dequantized())


def test_what_no_grid_holds():
    made_of_4_bits = made(8, -8, 7)
    five_bits = dataclasses.replace(made(8, 0, 31), offset=made_of_4_bits.scale)
    assert first_that_holds(five_bits) is None
    # Turned around, -128 would be 128.
    lowest = made(1, -128, -128)
    assert (lowest.scale < 0).any()
    assert first_that_holds(lowest) is None
    # A float16 would have few bits of it, or none.
    small = PrequantizedWeight(values=made_of_4_bits.values, scale=np.full((6, 8), 1e-7, np.float32), form="")
    assert first_that_holds(small) == "w8a8-block"


@pytest.mark.parametrize(("groups", "name"), [(8, "w4a8-offset"), (4, "w4a8-offset"), (2, "w4a8-128-offset")])
@pytest.mark.parametrize("lowest", [0, -8])
def test_offsets_are_kept_with_integers_from_zero_up(groups, name, lowest):
    whole = made(groups, lowest, lowest + 15)
    zeros = np.random.default_rng(1).integers(0, 16, whole.scale.shape)
    weight = dataclasses.replace(whole, offset=(-lowest - zeros).astype(np.float32) * whole.scale)
    assert first_that_holds(weight) == name
    held = precision_of(name).held(weight)
    assert held.values.min() == 0
    # A zero point of 4 bits times a float16 has 15 bits, of which a float16 keeps 11.
    error = np.repeat(np.abs(whole.scale) * 15, 256 // groups, axis=1) * 2**-11
    assert (np.abs(dequantize_weight(held) - weight.dequantized()) <= error).all()


def test_a_scale_of_zero_makes_zeros():
    weight = made(8, -8, 7)
    weight.scale[2, 3] = 0
    for name in ("w4a8", "w8a8-block"):
        held = precision_of(name).held(weight)
        assert held.scale.all()
        np.testing.assert_array_equal(dequantize_weight(held), weight.dequantized())


def test_members_in_other_groups_share_the_finer_ones():
    one, other = made(2, -8, 7), made(8, -127, 127, seed=1)
    both = stacked([one, other])
    assert both.num_groups == 8
    assert both.offset is None
    np.testing.assert_array_equal(both.dequantized(), np.concatenate([one.dequantized(), other.dequantized()]))


def kept(folder, *, precision=STORED, **options):
    checkpoint = open_checkpoint(str(folder))
    recipe = make_recipe(checkpoint.spec, precision=precision, alpha="off", **options)
    found = keep_grids(checkpoint, recipe, folder / "kept", lambda *_: contextlib.nullcontext(lambda count: None))
    return checkpoint, found


def weights_of(checkpoint, quantization):
    for linear in checkpoint.spec.linears():
        floats = np.concatenate([checkpoint.read(f"{member}.weight") for member in linear.members])
        weight = quantization.integers(linear.name)
        yield linear.name, floats, None if weight is None else dequantize_weight(weight)


def test_a_checkpoint_s_own_integers(tmp_path):
    save_quantized(tmp_path, gptq_config(), gptq())
    checkpoint, found = kept(tmp_path)
    precisions = {name: choice.precision for name, choice in found.quantization.choices.items()}
    assert precisions.pop("lm_head") == "w8a8-block"
    assert set(precisions.values()) == {"w4a8"}
    assert found.record == {"kept": {"GPTQ, 4 bits in groups of 32": 12}, "rounded": {"floats": 1}}
    for name, floats, weight in weights_of(checkpoint, found.quantization):
        if name != "lm_head":
            np.testing.assert_array_equal(weight, floats)
            assert found.quantization.choices[name].rounding == "stored"
        else:
            assert 0 < np.abs(weight - floats).max() <= np.abs(floats).max() / 254


def test_what_is_rounded_anew_has_no_blocks_where_a_back_end_lacks_them(tmp_path):
    save_quantized(tmp_path, _W8A8, compressed(_W8A8))
    _, found = kept(tmp_path, blocks=False)
    assert {choice.precision for choice in found.quantization.choices.values()} == {"w8a8-token"}
    assert found.record["rounded"] == {"floats": 1}


def test_a_quantized_checkpoint_is_taken_as_it_is_for_every_back_end(tmp_path, tiny_model):
    save_quantized(tmp_path, _W8A8, compressed(_W8A8))
    quantized, floats = open_checkpoint(str(tmp_path)), open_checkpoint(str(tiny_model))
    for blocks in (True, False):
        options = BuildOptions(model="", output=tmp_path, blocks=blocks)
        assert choose_precision(options, quantized) == STORED
        assert choose_precision(options, floats) == (None if blocks else "w8a8")
        # Calibration is asked for: then its weights are floats as any.
        asked = dataclasses.replace(options, alpha="0.5")
        assert choose_precision(asked, quantized) == (None if blocks else "w8a8")


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_the_same_integers_times_floats(tmp_path, layout):
    """`stored-a16`: what GPTQ and AWQ mean, in which nothing is rounded at all but the head."""
    config, tensors = (gptq_config(), gptq()) if layout == "gptq" else (awq_config(), awq())
    save_quantized(tmp_path, config, tensors)
    (_, coarse), (checkpoint, found) = kept(tmp_path), kept(tmp_path, precision=STORED_FLOATS)
    for name, choice in found.quantization.choices.items():
        other = coarse.quantization.choices[name].precision
        assert choice.precision == (other if name == "lm_head" else other.replace("w4a8", "w4a16"))
    for name, floats, weight in weights_of(checkpoint, found.quantization):
        if name != "lm_head" and layout == "gptq":
            np.testing.assert_array_equal(weight, floats)
    assert found.record["kept"] == coarse.record["kept"]


def test_channels_of_8_bits_are_per_token(tmp_path):
    save_quantized(tmp_path, _W8A8, compressed(_W8A8))
    checkpoint, found = kept(tmp_path, keep_float=["lm_head"])
    precisions = {name: choice.precision for name, choice in found.quantization.choices.items()}
    assert precisions.pop("lm_head") == "float"
    assert set(precisions.values()) == {"w8a8-token"}
    for name, floats, weight in weights_of(checkpoint, found.quantization):
        assert (weight is None) == (name == "lm_head")
        if weight is not None:
            np.testing.assert_array_equal(weight, floats)


def test_inputs_in_another_order_are_rounded_anew(tmp_path):
    save_quantized(tmp_path, gptq_config(desc_act=True), gptq(shuffled=True))
    checkpoint, found = kept(tmp_path)
    assert found.record["kept"] == {}
    assert found.record["rounded"]["GPTQ, 4 bits in groups of 32, inputs in another order"] == 12
    linear = next(iter(checkpoint.spec.linears()))
    assert stored_weight(checkpoint, linear).group_size == 1


def test_zeros_of_awq(tmp_path):
    save_quantized(tmp_path, awq_config(), awq())
    checkpoint, found = kept(tmp_path)
    assert found.record["kept"] == {"AWQ in groups of 32": 12}
    for name, floats, weight in weights_of(checkpoint, found.quantization):
        if name != "lm_head":
            # The offset's rounding to a float16: of 15 steps at most.
            assert np.abs(weight - floats).max() <= np.abs(floats).max() * 2**-11
