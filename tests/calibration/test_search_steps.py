"""The steps of the search on single linears: rounding in torch, clipping, learned smoothing, GPTQ."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.clipping import clip_weights, static_range
from calibration.gptq import corrections_of, gptq_round
from calibration.learned_smoothing import learn_factor
from calibration.output_error import LinearSample
from calibration.precisions.catalog import precision_of
from calibration.recipe import make_recipe
from calibration.search import LinearSearch, steps_of
from quasar.checkpoints import open_checkpoint
from quasar.numerics import (
    BLOCK,
    apply_scale,
    dequantize_tokens,
    dequantize_weight,
    quantize_tokens,
    quantize_weight,
)
from tests.tiny import save_tiny_model

TOKEN, BLOCKS, STATIC = (precision_of(name) for name in ("w8a8-token", "w8a8-block", "w8a8-static"))
NIBBLES = precision_of("w4a8")


def sample_with_outliers(tokens=200, inputs=64, outputs=48, seed=0) -> LinearSample:
    """Correlated inputs with a few loud channels, as after a SwiGLU."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn((inputs, inputs), generator=random)
    x = torch.randn((tokens, inputs), generator=random) @ mixing
    x[:, ::9] *= 40
    return LinearSample(
        x=x,
        weight=torch.randn((outputs, inputs), generator=random) * 0.1,
        amax=x.abs().amax(0),
        token_weights=torch.ones(tokens),
    )


@given(st.integers(0, 1000))
def test_rounding_in_torch_is_the_export_s(seed):
    """Integer for integer: what the search judges is what the graph computes."""
    random = np.random.default_rng(seed)
    x = (random.standard_normal((5, 64)) * 10.0 ** random.integers(-6, 4)).astype(np.float32)
    x[0] = 0
    tokens = dequantize_tokens(*quantize_tokens(x))
    np.testing.assert_array_equal(TOKEN.round_activations(torch.from_numpy(x), 0.0).numpy(), tokens)
    blocks = dequantize_tokens(*quantize_tokens(x.reshape(5, -1, BLOCK))).reshape(x.shape)
    np.testing.assert_array_equal(BLOCKS.round_activations(torch.from_numpy(x), 0.0).numpy(), blocks)
    for precision, in_blocks in ((TOKEN, False), (BLOCKS, True)):
        weight = torch.from_numpy(x)
        scale = precision.scales_of(weight)
        quantized = quantize_weight(x, blocks=in_blocks)
        np.testing.assert_array_equal(precision.round_weight(weight, scale).numpy(), quantized.values)
        np.testing.assert_array_equal(
            apply_scale(precision.round_weight(weight, scale), scale).numpy(), dequantize_weight(quantized)
        )


def test_static_activations_saturate():
    x = torch.tensor([[-10.0, -1.0, 0.004, 1.0, 10.0]])
    rounded = STATIC.round_activations(x, 1 / 127)
    np.testing.assert_allclose(rounded.numpy(), [[-128 / 127, -1, 1 / 127, 1, 1]], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_learned_factor_loses_less_than_the_best_alpha(seed):
    sample = sample_with_outliers(seed=seed)
    amax_x, amax_w = sample.x.abs().amax(0), sample.weight.abs().amax(0)
    factors = [amax_x**alpha / amax_w ** (1 - alpha) for alpha in np.arange(0.1, 1, 0.1)]
    start = min(factors, key=lambda factor: sample.error(TOKEN, factor))
    learned = learn_factor(start, sample.x, sample.weight, sample.token_weights)
    assert sample.error(TOKEN, learned) < 0.95 * sample.error(TOKEN, start)


def test_learned_factor_keeps_what_must_be_equal_equal():
    sample = sample_with_outliers()

    def tie(log_factor):
        pairs = log_factor.reshape(-1, 2)
        return pairs.mean(1, keepdim=True).expand_as(pairs).reshape(-1)

    learned = learn_factor(torch.ones(64), sample.x, sample.weight, sample.token_weights, tie)
    np.testing.assert_allclose(learned[::2], learned[1::2], rtol=1e-5)
    assert learned.std() > 0.1


@pytest.mark.parametrize("precision", [TOKEN, BLOCKS, NIBBLES], ids=lambda precision: precision.name)
def test_gptq_loses_less_than_the_nearest_integers(precision):
    sample = sample_with_outliers(tokens=400)
    scale = precision.scales_of(sample.weight)
    nearest = precision.rounded(sample.weight, scale)
    values = gptq_round(sample.weight, scale, corrections_of(sample.x), precision)
    assert values.dtype == torch.int8
    assert int(values.min()) >= (-8 if precision is NIBBLES else -127)
    assert int(values.max()) <= (7 if precision is NIBBLES else 127)

    def error(weight):
        return float((sample.x @ (weight - sample.weight).t()).square().sum())

    assert error(apply_scale(values, scale)) < 0.6 * error(nearest)


def test_gptq_of_inputs_that_never_fire_is_finite():
    sample = sample_with_outliers()
    sample.x[:, 3:7] = 0
    values = gptq_round(sample.weight, TOKEN.scales_of(sample.weight), corrections_of(sample.x), TOKEN)
    assert values.abs().float().mean() > 1


def test_rows_are_clipped_where_one_weight_is_loud_and_its_input_silent():
    sample = sample_with_outliers()
    sample.x[:, ::9] /= 40
    sample.weight[5, 11] = 6 * sample.weight[5].abs().max()
    sample.x[:, 11] *= 1e-4
    clip = clip_weights(sample, None, TOKEN)
    assert clip.shape == (len(sample.weight), 1)
    assert clip[5, 0] == pytest.approx(0.8)
    assert sample.error(TOKEN, None, clip=clip) < sample.error(TOKEN, None)


def test_groups_of_4_bits_are_clipped_one_by_one():
    sample = sample_with_outliers()
    sample.x[:, ::9] /= 40
    # In the second group of one row alone: loud, and its input silent.
    sample.weight[5, 43] = 6 * sample.weight[5].abs().max()
    sample.x[:, 43] *= 1e-4
    clip = clip_weights(sample, None, NIBBLES)
    assert clip.shape == (len(sample.weight), 2)
    assert clip[5, 1] == pytest.approx(0.8)
    assert sample.error(NIBBLES, None, clip=clip) < sample.error(NIBBLES, None)


def test_steps_follow_from_the_bits_of_weights_and_from_what_is_asked_for():
    assert steps_of(TOKEN, "quick") == ()
    assert "reconstructed rounding" not in steps_of(TOKEN, "normal")
    for effort in ("quick", "normal", "thorough"):
        assert steps_of(NIBBLES, effort)[-1] == "reconstructed rounding"
        assert steps_of(NIBBLES, effort, "rtn") == ()
        assert steps_of(NIBBLES, effort, "gptq") == ("reconstructed rounding",)
        assert steps_of(TOKEN, effort, "awq") == ("alpha per group",)


def test_static_range_leaves_out_what_hardly_ever_comes():
    sample = sample_with_outliers()
    sample.x[:, ::9] /= 40
    sample.x[17, 3] = 300 * sample.x.abs().max()
    amax = float(sample.x.abs().max())
    # The loud value counts for nothing: its input has no weight.
    sample.weight[:, 3] = 0
    scale, name = static_range(sample, None, STATIC, amax)
    assert name.startswith("percentile 99.")
    assert scale < amax / 127 / 10
    assert sample.error(STATIC, None, static_scale=scale) < sample.error(STATIC, None)


def sample_of_words(words, linear) -> LinearSample:
    """Inputs of which each token fires the channel of its word alone, as in a first block's MLP."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((len(words), linear.inputs), generator=random)
    x[:, :48] *= 0.02
    x[torch.arange(len(words)), torch.tensor(words)] = 20
    weight = torch.randn((linear.outputs, linear.inputs), generator=random) * 0.1
    return LinearSample(x=x, weight=weight, amax=x.abs().amax(0), token_weights=torch.ones(len(words)))


def test_alpha_per_group_is_chosen_by_words_that_its_factor_has_not_seen(tmp_path):
    spec = open_checkpoint(str(save_tiny_model(tmp_path, "llama", num_hidden_layers=1))).spec
    search = LinearSearch(spec, make_recipe(spec, precision="w8a8", alpha="auto"))
    linear = next(one for one in spec.layer_linears(0) if one.name.endswith("gate_up_proj"))
    # The words of the first half, of the second, and of other text.
    fitted = sample_of_words([token % 16 for token in range(128)] + [16 + token % 16 for token in range(128)], linear)
    other = sample_of_words([32 + token % 16 for token in range(128)], linear)
    errors = {
        alpha: fitted.error(TOKEN, search.fixed(linear, fitted, alpha).factor) for alpha in (0.3, 0.5, 0.6, 0.7, 0.8)
    }
    best_seen = min(errors, key=lambda alpha: errors[alpha])
    chosen = search.step("alpha per group", search.begin(linear, fitted), linear, fitted)
    assert best_seen >= 0.6
    assert chosen.choice.alpha is None or chosen.choice.alpha < best_seen
    assert other.error(TOKEN, chosen.factor) < 0.5 * other.error(TOKEN, search.fixed(linear, fitted, best_seen).factor)


def test_halves_of_a_sample_judge_each_other():
    sample = sample_with_outliers(tokens=9)
    (first_amax, second), (second_amax, first) = sample.crossed(100)
    torch.testing.assert_close(torch.cat([first.x, second.x]), sample.x)
    torch.testing.assert_close(first_amax, first.x.abs().amax(0))
    torch.testing.assert_close(second_amax, second.x.abs().amax(0))
    ((amax, alone),) = sample_with_outliers(tokens=1).crossed(100)
    torch.testing.assert_close(amax, alone.x[0].abs())
