"""Fidelity figures against torch, and on cases whose answer is known."""

import math

import numpy as np
import pytest
import torch

from calibration import float_model
from calibration.fake_quantization import FakeQuantizedLinear
from calibration.fidelity import FidelitySums, compare, kl_nats, log_softmax
from calibration.float_model import load_float_model
from calibration.output_error import LinearSample
from calibration.precisions.catalog import precision_of
from calibration.sqnr import output_sqnr_db
from calibration.texts import TokenizedText
from calibration.validation_split import DivergenceSums
from quasar.checkpoints import open_checkpoint
from quasar.errors import EngineError
from quasar.numerics import quantize_tokens, quantize_weight

RANDOM = np.random.default_rng(2)


def test_kl_is_torchs():
    p, q = (RANDOM.standard_normal((7, 50)).astype(np.float32) * 3 for _ in range(2))
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(q).double().log_softmax(-1),
        torch.from_numpy(p).double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    # float32 log-probabilities: about 1e-6 each, weighted by probabilities that sum to one.
    np.testing.assert_allclose(kl_nats(log_softmax(p), log_softmax(q)), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_equal_logits_have_no_divergence():
    logits = RANDOM.standard_normal((100, 30)).astype(np.float32)
    sums = FidelitySums()
    sums.add(logits, logits, RANDOM.integers(0, 30, 100))
    figures = sums.figures()
    assert (figures["mean_kl_nats"], figures["top1_agreement"], figures["tokens"]) == (0, 1, 100)
    assert figures["perplexity"] == figures["perplexity_float"]


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    sums = FidelitySums()
    sums.add(np.zeros((10, 64), np.float32), np.zeros((10, 64), np.float32), np.arange(10))
    assert sums.figures()["perplexity"] == pytest.approx(64)


def test_prompts_and_continuations_are_told_apart():
    """Continuation positions are those that predict its tokens; a position may belong to both."""
    vocabulary = 8
    text = TokenizedText(prompt=(1, 2, 3, 4), continuation=(5, 6))
    reference = np.zeros((6, vocabulary), np.float32)
    engine = reference.copy()
    engine[0, 0] = 5  # predicts token 2 of the prompt
    engine[4, 0] = 7  # predicts token 6 of the continuation

    def whole(logits):
        return lambda tokens: iter([logits])

    def pieces(logits):
        return lambda tokens: iter([logits[:1], logits[1:5], logits[5:]])

    figures = compare([text], whole(reference), pieces(engine))
    assert figures["tokens"] == 4
    assert figures["continuation"]["tokens"] == 2

    def divergence(logit):
        q = log_softmax(np.array([[logit] + [0] * 7], np.float32))
        return float(kl_nats(log_softmax(np.zeros((1, 8), np.float32)), q)[0])

    assert figures["mean_kl_nats"] == pytest.approx(divergence(5) / 4, abs=1e-5)
    assert figures["continuation"]["mean_kl_nats"] == pytest.approx(divergence(7) / 2, abs=1e-5)
    # Perplexity of the prompt: tokens 2, 3 and 4; the continuation's: 5 and 6.
    nll = [math.log(math.exp(5) + 7), math.log(8), math.log(8)]
    assert figures["perplexity"] == pytest.approx(math.exp(sum(nll) / 3), rel=1e-4)
    assert figures["continuation"]["perplexity_float"] == pytest.approx(8, rel=1e-4)


def test_sqnr_rises_when_outliers_are_smoothed():
    x = RANDOM.standard_normal((40, 64)).astype(np.float32)
    x[:, 5] *= 100
    weight = RANDOM.standard_normal((32, 64)).astype(np.float32)
    sample = LinearSample(
        x=torch.from_numpy(x),
        weight=torch.from_numpy(weight),
        amax=torch.from_numpy(np.abs(x).max(0)),
        token_weights=torch.ones(40),
    )

    def sqnr(factor):
        smoothed = sample.weight if factor is None else sample.weight * factor
        precision = precision_of("w8a8-token")
        rounded = precision.rounded(smoothed, precision.scales_of(smoothed))
        form = FakeQuantizedLinear(
            precision=precision, weight=rounded.__getitem__, num_outputs=len(rounded), factor=factor
        )
        return output_sqnr_db(sample, form)

    plain = sqnr(None)
    assert sqnr((sample.x.abs().amax(0) / sample.weight.abs().amax(0)).sqrt()) > plain + 5
    values, amax = quantize_tokens(x)
    quantized = quantize_weight(weight)
    y = (values.astype(np.float64) * amax / 127) @ (quantized.values * quantized.scale[:, None].astype(np.float64)).T
    exact = x.astype(np.float64) @ weight.T
    assert plain == pytest.approx(10 * np.log10((exact**2).sum() / ((exact - y) ** 2).sum()), abs=0.05)


def test_margins_and_positions_are_counted():
    """Four positions whose margins and first tokens are known; the float model always prefers token 0."""
    reference = np.zeros((4, 5), np.float32)
    reference[:, 0] = 4
    engine = reference.copy()
    engine[1, 1] = 4.05  # leads token 0 by 0.05: disagrees
    engine[2, 1] = 3.7  # trails by 0.3: agrees
    engine[3, 2] = 9  # leads by 5: disagrees
    sums = FidelitySums()
    sums.add(reference, engine, np.full(4, -1), np.array([0, 1, 40, 600]))
    details = sums.details()
    below = {row["below"]: row for row in details["margins"]}
    assert (below[0.1]["rows"], below[0.1]["disagreeing"], below[0.1]["caught"]) == (0.25, 1, 0.5)
    assert (below[0.5]["rows"], below[0.5]["disagreeing"], below[0.5]["caught"]) == (0.5, 0.5, 0.5)
    bins = details["by_position"]
    assert sum(one["tokens"] for one in bins) == 4
    assert (bins[0]["first"], bins[0]["tokens"], bins[0]["top1_agreement"]) == (0, 2, 0.5)
    assert bins[-1]["end"] is None
    assert bins[-1]["top1_agreement"] == 0


def test_logits_that_are_no_numbers_have_no_fidelity():
    numbers, none = np.zeros((1, 4), np.float32), np.full((1, 4), np.nan, np.float32)
    for reference, engine in ((numbers, none), (none, numbers)):
        with pytest.raises(EngineError, match="are no numbers"):
            FidelitySums().add(reference, engine, np.array([-1]))


def test_a_candidate_whose_logits_are_no_numbers_meets_no_bound():
    sums = DivergenceSums()
    sums.add(torch.zeros(2, 4), torch.full((2, 4), torch.nan), torch.tensor([True, False]))
    found = sums.divergence()
    assert (found.kl, found.answers_kl) == (math.inf, math.inf)


def test_a_float_model_in_bfloat16_is_said(tiny_model, monkeypatch, caplog):
    """Figures against it are not those of a build, which compares with float32 whatever the memory is."""
    checkpoint = open_checkpoint(str(tiny_model))
    assert load_float_model(checkpoint).dtype == torch.float32
    assert not caplog.records
    monkeypatch.setattr(float_model, "_fits_in_float32", lambda spec: False)
    assert load_float_model(checkpoint).dtype == torch.bfloat16
    (warning,) = caplog.messages
    assert "the float model runs in bfloat16" in warning
