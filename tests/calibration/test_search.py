"""The search over a (tiny) model, block by block: fake quantization, steps, resuming, and the ladder of precisions."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from calibration import block_search, fake_quantization, precision_search
from calibration.block_search import FITTED, HELD_OUT, OTHERS, BlockSearch
from calibration.fake_quantization import FakeQuantizedLinear, fake_quantized, module_of
from calibration.float_blocks import FloatBlocks
from calibration.float_model import load_float_model
from calibration.float_reference import float_logits
from calibration.precision_search import Bound, raise_precisions
from calibration.precisions.catalog import precision_of, rungs_above
from calibration.quantization import FidelityGoal, Quantization, quantize_model
from calibration.quantized_model import QuantizedModel
from calibration.recipe import make_recipe
from calibration.search import LinearSearch, Trial, steps_of
from calibration.sensitivity import measure_sensitivities
from calibration.smoothing import SmoothingFactors
from calibration.statistics import BlockWatch
from calibration.texts import TokenizedText
from calibration.validation_split import Divergence, ValidationSplit, split_validation
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
    """A tiny model, its texts, and what a walk over its blocks leaves."""

    def __init__(self, folder, architecture="llama", precision="w8a8", alpha="auto", loudness=20, **options):
        self.folder = folder
        folder_of_model = save_tiny_model(folder / "model", architecture, num_hidden_layers=2, **options)
        make_loud(folder_of_model, loudness)
        self.checkpoint = open_checkpoint(str(folder_of_model))
        self.spec = self.checkpoint.spec
        self.texts = texts_of(16)
        self.recipe = make_recipe(self.spec, precision=precision, alpha=alpha)
        self.fitted, self.held_out = split_validation(self.texts)

    def search(self, effort="normal", alternatives=(), name="walk", others=()):
        texts = {FITTED: self.fitted, HELD_OUT: self.held_out, OTHERS: others}
        return BlockSearch(
            FloatBlocks(self.checkpoint),
            self.recipe,
            texts,
            self.folder / name,
            silent,
            alternatives=alternatives,
            steps=steps_of(precision_of("w8a8-token"), effort),
        )

    def walk(self, *args, **options):
        return self.search(*args, **options).run()

    @cached_property
    def model(self):
        return load_float_model(self.checkpoint)

    @cached_property
    def validation(self):
        return ValidationSplit(self.model, self.spec, self.held_out)

    @cached_property
    def ladder(self):
        """The model at every quantized precision of the ladder, rounded to nearest."""
        rungs = rungs_above(precision_of("w8a8-token"))
        return self.walk("quick", alternatives=rungs, name="ladder").models


def make_loud(folder, loudness):
    """Loud channels before attention, as trained models have them."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("input_layernorm.weight"):
            value[::7] *= loudness
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
        weight = torch.cat([module_of(case.model, member).weight for member in linear.members]).detach()
        factor = torch.rand(linear.inputs, generator=random) + 0.5
        linears[linear.name] = FakeQuantizedLinear(
            precision=precision_of("w8a8-static"),
            weight=lambda rows, weight=weight * factor: weight[rows],
            num_outputs=linear.outputs,
            factor=factor,
            static_scale=1e-6,
        )

    def product(self, x):
        return (x / self.factor) @ self.weight(slice(None)).t()

    tokens = torch.tensor([case.held_out[0].tokens])
    with torch.no_grad():
        before = case.model(tokens).logits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeQuantizedLinear, "product", product)
            with fake_quantized(case.model, case.spec, linears):
                # Sums in another order: float32's rounding over three layers.
                torch.testing.assert_close(case.model(tokens).logits, before, atol=1e-4, rtol=1e-3)
        with fake_quantized(case.model, case.spec, linears):
            assert (case.model(tokens).logits - before).abs().max() > 0.1
        assert torch.equal(case.model(tokens).logits, before)


def test_a_linear_in_parts_of_rows_is_the_whole_one(monkeypatch):
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn((3, 64), generator=random), torch.randn((100, 64), generator=random)
    form = FakeQuantizedLinear(precision=precision_of("w8a8-token"), weight=weight.__getitem__, num_outputs=100)
    whole = form.product(x)
    monkeypatch.setattr(fake_quantization, "_VALUES_AT_ONCE", 64 * 7)
    torch.testing.assert_close(form.product(x), whole)


def test_the_walk_s_divergence_is_the_whole_model_s(case):
    """Block by block and all at once, the fake-quantized model says the same: to sums in another order."""
    walked = case.walk(alternatives=rungs_above(precision_of("w8a8-token")), name="divergence")
    for precision, quantized in walked.models.items():
        whole, found = case.validation.measure(quantized), walked.divergences[precision]
        assert found.kl == pytest.approx(whole.kl, rel=0.02)
        assert found.answers_kl == pytest.approx(whole.answers_kl, rel=0.02)
        assert found.top1 == pytest.approx(whole.top1, abs=1 / 64)
    token, blocks = walked.divergences.values()
    assert blocks.kl < token.kl


def test_steps_are_kept_only_where_held_out_text_agrees(case):
    quick, normal = case.walk("quick", name="quick"), case.walk("normal", name="normal")
    assert not quick.trace
    (step,) = normal.trace
    # Two blocks and the head.
    assert step["step"] == "refined factors"
    assert step["blocks"] == 3
    assert 0 < step["kept"] <= 3
    assert not step["dropped"]
    (before,), (after,) = (walked.divergences.values() for walked in (quick, normal))
    assert after.kl < 0.8 * before.kl
    assert {choice.precision for choice in normal.models["w8a8-token"].choices.values()} == {"w8a8-token"}


def test_a_step_that_gains_nothing_is_dropped(tmp_path, monkeypatch):
    """After the blocks that judge it, it is not tried again; and what it made is never kept."""
    case = Case(tmp_path)
    monkeypatch.setattr(block_search, "_JUDGED_BLOCKS", 1)
    tried = []

    def worse(self, name, base, linear, sample):
        tried.append(linear.name)
        return Trial(base.choice, torch.ones(linear.inputs) * torch.linspace(1, 1e4, linear.inputs))

    monkeypatch.setattr(LinearSearch, "step", worse)
    walked = case.walk()
    assert tried == [linear.name for linear in case.spec.layer_linears(0)]
    assert walked.trace == [{"step": "refined factors", "blocks": 1, "kept": 0, "gain": 0.0, "dropped": True}]
    quick = case.walk("quick", name="quick")
    assert quick.divergences == walked.divergences


def test_a_step_that_one_linear_spoils_is_kept_in_the_others(tmp_path, monkeypatch):
    case = Case(tmp_path)
    real = LinearSearch.step

    def spoiled(self, name, base, linear, sample):
        if linear.name.endswith("down_proj"):
            return Trial(replace(base.choice, smoothing="refined"), torch.linspace(1, 1e4, linear.inputs))
        return real(self, name, base, linear, sample)

    monkeypatch.setattr(LinearSearch, "step", spoiled)
    walked = case.walk()
    refined = {name for name, one in walked.models["w8a8-token"].choices.items() if one.smoothing == "refined"}
    in_blocks = refined - {case.spec.head.name}
    assert in_blocks
    assert not any(name.endswith("down_proj") for name in in_blocks)


def test_a_thorough_search_tries_every_step(case):
    walked = case.walk("thorough", name="thorough")
    assert [step["step"] for step in walked.trace] == list(steps_of(precision_of("w8a8-token"), "thorough"))
    choices = walked.models["w8a8-token"].choices.values()
    assert "reconstructed" in {choice.rounding for choice in choices}


def test_a_fixed_alpha_is_taken_as_it_is(tmp_path):
    case = Case(tmp_path, alpha=0.7)
    walked = case.walk()
    assert not walked.trace
    best = walked.models["w8a8-token"]
    assert {(choice.alpha, choice.smoothing, choice.rounding) for choice in best.choices.values()} == {
        (0.7, "alpha", "nearest")
    }
    off = Case(tmp_path / "off", alpha="off")
    off.held_out = []
    walked = off.walk()
    assert not walked.divergences
    assert set(walked.models["w8a8-token"].factors.values()) == {None}


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_walk_that_was_stopped_goes_on(stop, tmp_path, monkeypatch):
    """From the block that it was on, to the same bytes."""
    monkeypatch.setattr(block_search, "_SAVE_SECONDS", 0.0)
    case = Case(tmp_path)
    others = texts_of(3, seed=9)
    rungs = rungs_above(precision_of("w8a8-token"))
    whole = case.search(alternatives=rungs, name="whole", others=others)
    expected = whole.run()

    class KilledError(Exception):
        pass

    visited = []
    visit, head = BlockSearch._visit, BlockSearch._visit_head

    def stopping(self, index):
        if index == stop and len(visited) <= stop:
            raise KilledError
        visited.append(index)
        visit(self, index)

    def stopping_at_head(self):
        if stop == 2 and len(visited) == 2:
            visited.append("head")
            raise KilledError
        head(self)

    monkeypatch.setattr(BlockSearch, "_visit", stopping)
    monkeypatch.setattr(BlockSearch, "_visit_head", stopping_at_head)
    with pytest.raises(KilledError):
        case.walk(alternatives=rungs, name="stopped", others=others)
    monkeypatch.setattr(BlockSearch, "_visit", visit)
    monkeypatch.setattr(BlockSearch, "_visit_head", head)
    loads = []
    monkeypatch.setattr(FloatBlocks, "block", recording(FloatBlocks.block, loads))
    again = case.search(alternatives=rungs, name="stopped", others=others)
    found = again.run()
    assert loads == list(range(stop, 2))
    assert found.divergences == expected.divergences
    assert found.figures == expected.figures
    assert [model.choices for model in found.models.values()] == [model.choices for model in expected.models.values()]
    left, right = (
        {path.name: path.read_bytes() for path in (case.folder / name).rglob("*.safetensors")}
        for name in ("whole", "stopped")
    )
    assert left == right
    # Once more: nothing is computed.
    loads.clear()
    assert case.walk(alternatives=rungs, name="stopped", others=others).divergences == expected.divergences
    assert not loads


def recording(function, calls):
    def called(self, index):
        calls.append(index)
        return function(self, index)

    return called


def test_a_block_at_a_time_is_the_whole_float_model(case, tmp_path):
    texts = texts_of(5, seed=3)
    recipe = make_recipe(case.spec, precision="fp32", alpha="off")
    read = float_logits(FloatBlocks(case.checkpoint), recipe, texts, tmp_path, silent)
    for text in texts:
        with torch.no_grad():
            expected = case.model(torch.tensor([text.tokens])).logits[0].numpy()
        # Sums in another order.
        np.testing.assert_allclose(np.concatenate(list(read(text.tokens))), expected, atol=1e-4)


def test_a_float_walk_that_was_stopped_is_no_reference(case, tmp_path, monkeypatch):
    """It goes on from its block: hidden states half way through the model are not what the head reads."""
    monkeypatch.setattr(block_search, "_SAVE_SECONDS", 0.0)
    texts, recipe = texts_of(3, seed=3), make_recipe(case.spec, precision="fp32", alpha="off")
    visit = BlockSearch._visit

    class KilledError(Exception):
        pass

    def stopping(self, index):
        if index == 1:
            raise KilledError
        visit(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(BlockSearch, "_visit", stopping)
        with pytest.raises(KilledError):
            float_logits(FloatBlocks(case.checkpoint), recipe, texts, tmp_path, silent)
    assert (tmp_path / "walk.safetensors").is_file()
    read = float_logits(FloatBlocks(case.checkpoint), recipe, texts, tmp_path, silent)
    with torch.no_grad():
        expected = case.model(torch.tensor([texts[0].tokens])).logits[0].numpy()
    # Sums in another order.
    np.testing.assert_allclose(np.concatenate(list(read(texts[0].tokens))), expected, atol=1e-4)


def test_only_one_block_has_weights(case):
    blocks = FloatBlocks(case.checkpoint)
    layers = blocks.model.model.layers
    with blocks.block(1):
        assert all(value.is_meta for value in layers[0].parameters())
        assert not any(value.is_meta for value in layers[1].parameters())
    assert all(value.is_meta for value in layers.parameters())


def test_the_gate_decides_by_the_answers(case, tmp_path):
    found = {}
    for gate in (1e9, 1e-9):
        recipe = replace(case.recipe, gate=gate)
        quantized = quantize_model(case.checkpoint, recipe, case.texts, tmp_path, silent)
        found[gate] = quantized
        assert quantized.record["gate"]["max_answers_kl"] == gate
        assert quantized.record["gate"]["judged_on"] == "held-out text"
    assert found[1e9].record["gate"]["precision"] == "w8a8-token"
    assert found[1e9].quantization.recipe(recipe).precision == "w8a8"
    assert found[1e-9].record["gate"]["precision"] == "w8a8-block"
    assert found[1e-9].quantization.recipe(recipe).precision == "w8a8-block"
    assert set(found[1e-9].record["search"]["precisions"]) == {"w8a8-token", "w8a8-block"}
    failed = quantize_model(case.checkpoint, replace(case.recipe, gate=1e9), case.texts, tmp_path, silent, room=0.0)
    assert failed.record["gate"] == {
        "max_answers_kl": 1e9,
        "judged_on": "evaluation prompts",
        "precision": "w8a8-block",
    }


def test_few_texts_are_not_called_held_out(case, tmp_path):
    quantized = quantize_model(case.checkpoint, replace(case.recipe, gate=1e9), case.texts[:3], tmp_path, silent)
    assert quantized.record["gate"]["judged_on"] == "fitted text"
    assert quantized.record["search"]["held_back_tokens"] == 0


def test_sensitivities_are_the_kl_that_one_linear_adds(tmp_path):
    """Against the KL of the model with that linear alone quantized, to a factor of 2: 128 tokens, two draws each."""
    case = Case(tmp_path, loudness=1)
    best = case.walk("quick").models["w8a8-token"]
    linears = best.fake_quantized_linears()
    found = measure_sensitivities(
        case.model,
        case.spec,
        case.validation.sequences,
        {name: {"w8a8-token": form} for name, form in linears.items()},
    )
    ratios = []
    for name in linears:
        alone = best.with_precisions(dict.fromkeys(linears, "float") | {name: "w8a8-token"}, {})
        ratios.append(found[name]["w8a8-token"] / case.validation.measure(alone).kl)
    assert min(ratios) > 0.5
    assert max(ratios) < 2
    assert 0.8 < np.mean(ratios) < 1.25


def latency_of(spec):
    return {linear.name: {"w4a8": 0.6, "w8a8-token": 1.0, "w8a8-block": 1.5, "float": 4.0} for linear in spec.linears()}


def raised(case, bound):
    found = raise_precisions(case.ladder, case.validation, latency_of(case.spec), bound, case.spec, case.model, silent)
    return case.ladder["w8a8-token"], *found


def test_linears_are_raised_until_the_bound_is_met(case):
    base = case.validation.measure(case.ladder["w8a8-token"])
    counts = []
    for share in (0.7, 0.1, 0.001):
        _, found, trace = raised(case, Bound(max_kl=share * base.kl))
        assert trace[-1].kl <= share * base.kl
        assert case.validation.measure(found).kl == pytest.approx(trace[-1].kl)
        precisions = [choice.precision for choice in found.choices.values()]
        counts.append(sum({"w8a8-token": 0, "w8a8-block": 1, "float": 2}[precision] for precision in precisions))
    assert 0 < counts[0] <= counts[1] <= counts[2]
    assert counts[0] < counts[2]


def test_a_bound_that_is_met_already_raises_nothing(case):
    best, found, trace = raised(case, Bound(max_kl=100.0))
    assert found is best
    assert not trace


def test_top1_alone_can_be_the_bound(case):
    base = case.validation.measure(case.ladder["w8a8-token"])
    goal = (1 + base.top1) / 2
    _, found, trace = raised(case, Bound(min_top1=goal))
    assert trace[-1].top1 >= goal > base.top1
    assert isinstance(found, QuantizedModel)


@pytest.mark.parametrize("fewest", [1, 5, 9, 16, 17, 18])
def test_the_fewest_steps_that_meet_top1_are_taken(fewest, case, monkeypatch):
    """Nothing estimates top-1: steps double until they meet it, and are then bisected, up to all but the last one."""
    names = [linear.name for linear in case.spec.linears()]
    # One linear after another goes to blocks, and then one after another to float: 18 steps.
    added = {name: {"w8a8-token": 2.0, "w8a8-block": 0.5} for name in names}
    monkeypatch.setattr(precision_search, "measure_sensitivities", lambda *_, **__: added)
    measured = []

    def measure(model):
        precisions = [choice.precision for choice in model.choices.values()]
        steps = sum({"w8a8-token": 0, "w8a8-block": 1, "float": 2}[precision] for precision in precisions)
        measured.append(steps)
        return Divergence(kl=0.1, top1=1.0 if steps >= fewest else 0.5, answers_kl=0.1)

    assert len(names) == 9
    monkeypatch.setattr(case.validation, "measure", measure)
    if fewest == 18:
        with pytest.raises(BuildError, match=r"met by no engine with a quantized linear: the best .* top-1 0\.5000"):
            raised(case, Bound(min_top1=0.9))
        assert measured == [0, 1, 3, 7, 15, 17]
        return
    _, found, trace = raised(case, Bound(min_top1=0.9))
    assert [one.top1 for one in trace] == [0.5] * (len(trace) - 1) + [1.0]
    assert len(measured) <= 9
    measure(found)
    assert measured[-1] == fewest


def test_a_bound_that_only_float_meets_is_refused(case):
    with pytest.raises(BuildError, match=r"met by no engine with a quantized linear: the best reached KL"):
        raised(case, Bound(max_kl=1e-12))


def test_the_artifact_holds_what_the_search_decided(case, tmp_path):
    target = FidelityGoal(bound=Bound(max_kl=0.02), latency=latency_of(case.spec))
    recipe = make_recipe(case.spec, precision="auto", alpha="auto")
    found = quantize_model(case.checkpoint, recipe, case.texts, tmp_path, silent, goal=target)
    found.quantization.save(tmp_path)
    again = Quantization.load(tmp_path)
    assert again.choices == found.quantization.choices
    assert list(again.choices) == [linear.name for linear in case.spec.linears()]
    assert found.record["search"]["raised"][-1]["kl"] <= 0.02
    weights = PreparedWeights(case.checkpoint, again.recipe(recipe), again.factors, again.integers, again.static_scales)
    for linear in case.spec.linears():
        precision = again.choices[linear.name].precision
        assert found.figures[linear.name].choice == again.choices[linear.name]
        assert weights.linear(linear).precision.name == precision
        if precision == "w8a8-block":
            assert weights.linear(linear).weight.scale.shape == (linear.outputs, linear.inputs // 32)


def test_precision_auto_leaves_alone_what_is_kept_float(case, tmp_path):
    target = FidelityGoal(bound=Bound(max_kl=0.02), latency=latency_of(case.spec))
    recipe = make_recipe(case.spec, precision="auto", alpha="off", keep_float=["lm_head"])
    found = quantize_model(case.checkpoint, recipe, case.texts, tmp_path, silent, goal=target)
    assert found.record["search"]["raised"]
    assert found.quantization.choices["lm_head"].precision == "float"
    assert list(found.quantization.choices) == [linear.name for linear in case.spec.linears()]


def test_a_linear_that_stays_float_has_figures_too(case, tmp_path):
    recipe = make_recipe(case.spec, precision="w8a8", alpha=0.5, keep_float=["*.down_proj", "lm_head"])
    found = quantize_model(case.checkpoint, recipe, case.texts, tmp_path, silent)
    for linear in case.spec.linears():
        figures = found.figures[linear.name]
        kept = linear.name.endswith("down_proj") or linear.name == "lm_head"
        assert (figures.choice.precision == "float") == (figures.sqnr_db is None) == kept
        assert figures.amax_before > 0
        assert (found.quantization.integers(linear.name) is None) == kept


def test_a_linear_whose_input_takes_no_factor_is_not_smoothed(tmp_path):
    """With norms after attention and MLP, q/k/v and gate/up read the residual stream itself."""
    case = Case(tmp_path, "olmo2")
    unsmoothed = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    quick, normal = (case.walk(effort, name=effort).models["w8a8-token"] for effort in ("quick", "normal"))
    for model in (quick, normal):
        for linear in case.spec.linears():
            if linear.name.endswith(unsmoothed):
                assert (model.choices[linear.name].alpha, model.choices[linear.name].smoothing) == (None, "off")
                assert model.factors[linear.name] is None
    smoothed = [name for name, factor in quick.factors.items() if factor is not None]
    assert len(smoothed) == 2 * 2 + 1


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gemma2"])
def test_tokens_are_weighed_by_what_the_next_norm_divides_by(architecture, tmp_path):
    """The residual stream, or where norms follow attention and MLP, what these normalize."""
    case = Case(tmp_path, architecture)
    blocks = FloatBlocks(case.checkpoint)
    ((batch, hidden),) = blocks.embed({FITTED: [case.texts[0].tokens]})[FITTED]
    watch = BlockWatch(blocks.model, case.spec, 0, every=3)
    watch.real = batch.real
    norms = []
    with blocks.block(0):
        name = "mlp_output_layernorm" if case.spec.layers[0].output_norms else "post_attention_layernorm"
        module_of(blocks.model, f"layers.0.{name}").register_forward_pre_hook(lambda _, x: norms.append(x[0]))
        with watch.watching():
            after = blocks.run_block(0, batch, hidden)
    _, output, _, down = case.spec.layer_linears(0)
    statistics = watch.inputs[down.name if case.spec.layers[0].output_norms else output.name]
    torch.testing.assert_close(statistics.weights[0], 1 / norms[0][0, ::3].square().mean(-1))
    if not case.spec.layers[0].output_norms:
        torch.testing.assert_close(watch.inputs[down.name].weights[0], 1 / after[0, ::3].square().mean(-1))
    assert {name for name, one in watch.inputs.items() if one.weights} == {output.name, down.name}
    x = watch.inputs[down.name]
    assert len(x.parts[0]) == len(x.weights[0]) == -(-len(case.texts[0].tokens) // 3)


def test_factors_of_the_model_are_folded_into_scales(tmp_path):
    """Integers stay those that the search found: the residual's factor is in the scale, the logits' in the norm."""
    options = {"residual_multiplier": 0.6, "logits_scaling": 0.5}
    case = Case(tmp_path, "granite", "w8a8-static", alpha="off", **options)
    quantized = case.walk().models["w8a8-static"]
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
