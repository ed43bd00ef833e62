"""The search over a whole (tiny) model: fake quantization, steps, sensitivities, and the ladder of precisions."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from calibration.fake_quantization import FakeQuantizedLinear, fake_quantized
from calibration.float_model import load_float_model
from calibration.precision_search import Bound, raise_precisions
from calibration.precisions.catalog import precision_of
from calibration.quantization import FidelityGoal, Quantization, quantize_model
from calibration.quantized_model import QuantizedModel
from calibration.recipe import make_recipe
from calibration.search import STEPS, Search
from calibration.sensitivity import measure_sensitivities
from calibration.smoothing import SmoothingFactors
from calibration.statistics import collect_statistics
from calibration.texts import TokenizedText
from calibration.validation_split import ValidationSplit, split_validation
from calibration.weights import PreparedWeights
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError, CheckpointError
from tests.tiny import VOCABULARY, save_tiny_model


@contextmanager
def silent(description, total):
    yield lambda count: None


def texts_of(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        TokenizedText(
            prompt=tuple(random.integers(0, VOCABULARY, 20).tolist()),
            continuation=tuple(random.integers(0, VOCABULARY, 12).tolist()),
        )
        for _ in range(count)
    ]


class Case:
    """A tiny model, its texts, and a search over it."""

    def __init__(self, folder, architecture="llama", precision="w8a8", alpha="auto", loudness=20, **options):
        folder_of_model = save_tiny_model(folder / "model", architecture, num_hidden_layers=2, **options)
        self.checkpoint = open_checkpoint(str(folder_of_model))
        self.spec = self.checkpoint.spec
        self.model = load_float_model(self.checkpoint)
        # Loud channels, as trained models have them.
        with torch.no_grad():
            for layer in self.model.model.layers:
                if self.spec.layers[0].input_norms:
                    layer.input_layernorm.weight[::7] *= loudness
        self.texts = texts_of(16)
        self.recipe = make_recipe(self.spec, precision=precision, alpha=alpha)
        self.fitted, self.held_out = split_validation(self.texts)
        statistics = collect_statistics(self.model, self.spec, [text.tokens for text in self.fitted])
        self.validation = ValidationSplit(self.model, self.held_out, self.spec.vocab_size)
        self.search = Search(self.model, self.spec, self.recipe, statistics, folder / "scratch", silent)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("search"))


def test_the_validation_split_is_not_fitted_to():
    texts = texts_of(16)
    fitted, held_out = split_validation(texts)
    assert len(held_out) == 4
    assert sorted(map(id, fitted + held_out)) == sorted(map(id, texts))
    assert [id(text) for text in split_validation(texts, seed=1)[1]] != [id(text) for text in held_out]
    few = texts[:7]
    assert split_validation(few) == (few, few)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_fake_quantized_linears_are_the_model_s_own_where_nothing_is_rounded(architecture, tmp_path):
    """Fused members, biases and smoothing, to float32's rounding; outside, the model is what it was."""
    case = Case(tmp_path, architecture)
    random = torch.Generator().manual_seed(0)
    linears = {}
    for linear in case.spec.linears():
        sample = case.search.sample(linear)
        factor = torch.rand(linear.inputs, generator=random) + 0.5
        weight = sample.weight * factor
        linears[linear.name] = FakeQuantizedLinear(
            precision=precision_of("w8a8-static"), weight=lambda weight=weight: weight, factor=factor, static_scale=1e-6
        )

    def product(self, x):
        return (x / self.factor) @ self.weight().t()

    before = case.validation.measure()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeQuantizedLinear, "product", product)
        with fake_quantized(case.model, case.spec, linears):
            inside = case.validation.measure()
    assert before.kl == case.validation.measure().kl == 0
    # Sums in another order: float32's rounding over three layers.
    assert 0 < inside.kl + (1 - inside.top1) + 1e-12 < 1e-6
    with fake_quantized(case.model, case.spec, linears):
        assert case.validation.measure().kl > 0.1


def test_steps_are_kept_only_where_the_validation_split_agrees(case):
    best, trace = case.search.run(case.validation)
    assert [step.step for step in trace] == ["alpha 0.5", *STEPS]
    least = trace[0].kl
    for step in trace[1:]:
        assert step.kept == (step.kl < least)
        least = min(least, step.kl)
    assert case.search.measure(best, case.validation).kl == pytest.approx(least)
    assert least < 0.8 * trace[0].kl
    assert {choice.precision for choice in best.choices.values()} == {"w8a8-token"}


def test_a_fixed_alpha_is_taken_as_it_is(tmp_path):
    case = Case(tmp_path, alpha=0.7)
    best, trace = case.search.run(case.validation)
    assert [step.step for step in trace] == ["alpha 0.7"]
    assert {(choice.alpha, choice.smoothing, choice.rounding) for choice in best.choices.values()} == {
        (0.7, "alpha", "nearest")
    }
    off, trace = Case(tmp_path, alpha="off").search.run(None)
    assert not trace
    assert set(off.factors.values()) == {None}


def test_sensitivities_are_the_kl_that_one_linear_adds(tmp_path):
    """Against the KL of the model with that linear alone quantized, to a factor of 2: 128 tokens, two draws each."""
    case = Case(tmp_path, loudness=1)
    best, _ = case.search.run(case.validation, steps=())
    linears = best.fake_quantized_linears()
    found = measure_sensitivities(
        case.model,
        case.spec,
        case.validation.sequences,
        {name: {"w8a8-token": form} for name, form in linears.items()},
    )
    ratios = []
    for name, form in linears.items():
        with fake_quantized(case.model, case.spec, {name: form}):
            ratios.append(found[name]["w8a8-token"] / case.validation.measure().kl)
    assert min(ratios) > 0.5
    assert max(ratios) < 2
    assert 0.8 < np.mean(ratios) < 1.25


def latency_of(spec):
    return {linear.name: {"w8a8-token": 1.0, "w8a8-block": 1.5, "float": 4.0} for linear in spec.linears()}


def raised(case, bound):
    best, _ = case.search.run(case.validation, steps=())
    found = raise_precisions(
        case.search, best, case.validation, latency_of(case.spec), bound, case.spec, case.model, silent
    )
    return best, *found


def test_linears_are_raised_until_the_bound_is_met(case):
    base = case.search.measure(case.search.run(case.validation, steps=())[0], case.validation)
    counts = []
    for share in (0.7, 0.1, 0.001):
        _, found, trace = raised(case, Bound(max_kl=share * base.kl))
        assert trace[-1].kl <= share * base.kl
        assert case.search.measure(found, case.validation).kl == pytest.approx(trace[-1].kl)
        precisions = [choice.precision for choice in found.choices.values()]
        counts.append(sum({"w8a8-token": 0, "w8a8-block": 1, "float": 2}[precision] for precision in precisions))
    assert 0 < counts[0] <= counts[1] <= counts[2]
    assert counts[0] < counts[2]


def test_a_bound_that_is_met_already_raises_nothing(case):
    best, found, trace = raised(case, Bound(max_kl=100.0))
    assert found is best
    assert not trace


def test_top1_alone_can_be_the_bound(case):
    base = case.search.measure(case.search.run(case.validation, steps=())[0], case.validation)
    goal = (1 + base.top1) / 2
    _, found, trace = raised(case, Bound(min_top1=goal))
    assert trace[-1].top1 >= goal > base.top1
    assert isinstance(found, QuantizedModel)


def test_a_bound_that_only_float_meets_is_refused(case):
    with pytest.raises(BuildError, match=r"met by no engine with an INT8 linear: the best reached KL"):
        raised(case, Bound(max_kl=1e-12))


def test_the_artifact_holds_what_the_search_decided(case, tmp_path):
    target = FidelityGoal(bound=Bound(max_kl=0.02), latency=latency_of(case.spec))
    recipe = make_recipe(case.spec, precision="auto", alpha="auto")
    found = quantize_model(case.model, case.spec, recipe, case.texts, tmp_path, silent, target)
    found.quantization.save(tmp_path)
    again = Quantization.load(tmp_path)
    assert again.choices == found.quantization.choices
    assert list(again.choices) == [linear.name for linear in case.spec.linears()]
    assert found.record["search"]["steps"][-1]["kl"] <= 0.02
    weights = PreparedWeights(case.checkpoint, again.recipe(recipe), again.factors, again.integers, again.static_scales)
    for linear in case.spec.linears():
        precision = again.choices[linear.name].precision
        assert weights.linear(linear).precision.name == precision
        if precision == "w8a8-block":
            assert weights.linear(linear).weight.scale.shape == (linear.outputs, linear.inputs // 32)


def test_a_linear_whose_input_takes_no_factor_is_not_smoothed(tmp_path):
    """With norms after attention and MLP, q/k/v and gate/up read the residual stream itself."""
    case = Case(tmp_path, "olmo2")
    unsmoothed = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    for model in (case.search._begin(0.5), case.search.run(case.validation)[0]):
        for linear in case.spec.linears():
            if linear.name.endswith(unsmoothed):
                assert (model.choices[linear.name].alpha, model.choices[linear.name].smoothing) == (None, "off")
                assert model.factors[linear.name] is None
    smoothed = [name for name, factor in case.search._begin(0.5).factors.items() if factor is not None]
    assert len(smoothed) == 2 * 2 + 1
    # What o_proj makes is normed at once: its errors count as that norm sees them.
    weights = case.search._statistics.token_weights
    assert set(weights) == {
        f"layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_factors_of_the_model_are_folded_into_scales(tmp_path):
    """Integers stay those that the search found: the residual's factor is in the scale, the logits' in the norm."""
    options = {"residual_multiplier": 0.6, "logits_scaling": 0.5}
    case = Case(tmp_path, "granite", "w8a8-static", alpha="off", **options)
    quantized = case.search.run(None)[0]
    integers = {name: folder.read(name) for name, folder in quantized.folders.items()}
    scales = {name: choice.static_scale for name, choice in quantized.choices.items()}
    weights = PreparedWeights(case.checkpoint, case.recipe, SmoothingFactors(), integers.__getitem__, scales)
    for linear in case.spec.linears():
        prepared = weights.linear(linear)
        np.testing.assert_array_equal(prepared.weight.values, integers[linear.name].values)
        factor = 0.6 if linear.name.endswith(("o_proj", "down_proj")) else 1.0
        np.testing.assert_allclose(prepared.weight.scale, integers[linear.name].scale * factor, rtol=1e-6)
        expected = scales[linear.name] * (2.0 if linear.name == "lm_head" else 1.0)
        assert prepared.static_scale == pytest.approx(expected)
    np.testing.assert_array_equal(weights.vector("norm.weight"), case.checkpoint.read("norm.weight") * 2)


def test_bounds():
    with pytest.raises(BuildError, match="needs a bound"):
        Bound().check()
    both = Bound(max_kl=0.01, min_top1=0.95)
    assert str(both) == "KL at most 0.01, top-1 at least 0.95"
    assert both.met(0.01, 0.95)
    assert not both.met(0.011, 0.99)
    assert not both.met(0.001, 0.94)
    tighter = both.with_room(0.8)
    assert (tighter.max_kl, tighter.min_top1) == (pytest.approx(0.008), pytest.approx(0.96))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(value, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = save_tiny_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    message = rf"layers.1.mlp.up_proj.weight holds {value} at \[7, 3\]; finite weights were expected"
    with pytest.raises(CheckpointError, match=message):
        load_float_model(checkpoint)
    weights = PreparedWeights(
        checkpoint, make_recipe(checkpoint.spec, precision="fp32", alpha="off"), SmoothingFactors()
    )
    with pytest.raises(CheckpointError, match=message):
        weights.linear(
            next(linear for linear in checkpoint.spec.linears() if linear.name == "layers.1.mlp.gate_up_proj")
        )
