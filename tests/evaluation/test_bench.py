"""`bench` counts emitted tokens and takes total over total."""

import pytest

import runtime
from evaluation.bench import bench, make_arms, mean_ratios, ratios, total
from quasar.text import Prompt
from runtime.stats import Stats


def stats(tokens, rounds, seconds):
    return Stats(
        prompt_tokens=3,
        reused_tokens=0,
        tokens=tokens,
        rounds=rounds,
        drafted=7,
        accepted=tokens - 1 - rounds,
        prefill_seconds=0.5,
        decode_seconds=seconds,
        draft_seconds=0.0,
        sample_seconds=0.0,
        wait_seconds=0.0,
        finish_reason="length",
    )


def test_totals_leave_the_prefill_token_out():
    sums = total([stats(11, 5, 1.0), stats(31, 20, 3.0)])
    assert sums["tokens"] == 42
    assert sums["tokens_per_second"] == pytest.approx(40 / 4)
    assert sums["acceptance_length"] == pytest.approx(40 / 25)
    assert sums["prefill_seconds"] == 1.0


def test_mean_ratios_weigh_prompts_alike():
    runs = {
        "quantized_plain": [stats(11, 10, 1.0), stats(101, 100, 10.0), stats(1, 0, 0.0)],
        "quantized_speculative": [stats(11, 5, 0.5), stats(101, 100, 10.0), stats(1, 0, 0.0)],
    }
    assert mean_ratios(runs) == {"quantized_speculative_over_quantized_plain": pytest.approx(1.5)}


def test_ratios_of_arms_that_were_run():
    arms = {"float_plain": {"tokens_per_second": 10.0}, "quantized_plain": {"tokens_per_second": 25.0}}
    assert ratios(arms) == {"quantized_plain_over_float_plain": 2.5}


def test_all_arms_on_a_real_engine(tiny_engine, build_engine, tiny_model):
    prompts = [
        Prompt(messages=({"role": "user", "content": "one two one two"},), category="a"),
        Prompt(messages=({"role": "user", "content": "abc abc"},), category="b"),
    ]
    with runtime.load(tiny_engine) as quantized, runtime.load(build_engine(tiny_model, precision="fp32")) as other:
        result = bench(make_arms(quantized, other, "auto"), prompts, max_new_tokens=12)
    names = ["float_plain", "float_speculative", "quantized_plain", "quantized_speculative", "quantized_lookup"]
    assert list(result["arms"]) == names
    assert (
        set(result["ratios"])
        == set(result["mean_ratios"])
        == {
            "quantized_speculative_over_float_plain",
            "quantized_plain_over_float_plain",
            "quantized_speculative_over_quantized_plain",
            "quantized_speculative_over_quantized_lookup",
            "quantized_lookup_over_quantized_plain",
        }
    )
    assert (result["drafters"]["quantized_lookup"], result["drafters"]["quantized_speculative"]) == (
        *("prompt-lookup", "auto"),
    )
    assert set(result["categories"]) == {"a", "b"}
    for name in names:
        parts = [result["categories"][category]["arms"][name]["tokens"] for category in "ab"]
        assert result["arms"][name]["tokens"] == sum(parts) > 0
    assert result["arms"]["quantized_plain"]["tokens"] == result["arms"]["quantized_speculative"]["tokens"]
    assert result["arms"]["quantized_plain"]["acceptance_length"] == 1
