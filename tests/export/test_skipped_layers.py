"""Engines without some layers: what transformers computes without them, and what they share with the whole engine."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import runtime
from calibration.sqnr import LINEAR_FIGURES
from engines.loading import load_engine
from engines.manifest import CACHE_TREATMENTS
from tests.graphs import run_in_chunks
from tests.tiny import VOCABULARY, save_tiny_model

# float32 sums in another order, through 2 layers.
TOLERANCE = 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers_without_the_layers(architecture, tmp_path, build_engine):
    folder = save_tiny_model(tmp_path / "model", architecture, num_hidden_layers=4)
    loaded = load_engine(build_engine(folder, precision="fp32", skip_layers="1-2"))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 40)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(run_in_chunks(loaded.session, tokens, 7), expected, rtol=0, atol=TOLERANCE)


def test_smoothed_layers_stay_those_of_the_whole_engine(tiny_model, tiny_engine, build_engine):
    """So a smoothed engine may draft on the whole one's cache; quantized by itself it would be smoothed otherwise."""
    path = build_engine(tiny_model, skip_layers="1")
    whole, rest = (json.loads((one / "manifest.json").read_text()) for one in (tiny_engine, path))
    assert rest["contract"]["num_layers"] == whole["contract"]["num_layers"] - 1
    assert rest["hashes"]["cache_value_smoothing"] == whole["hashes"]["cache_value_smoothing"] != "none"
    assert all(rest["hashes"][name] == whole["hashes"][name] for name in CACHE_TREATMENTS)
    figures = [json.loads((one / LINEAR_FIGURES).read_text()) for one in (tiny_engine, path)]
    assert list(figures[1]) == list(rest["linears"])
    assert figures[1]["layers.1.mlp.down_proj"] == figures[0]["layers.2.mlp.down_proj"]
    # Fidelity is the distance from the whole model, so losing a layer shows.
    assert rest["fidelity"]["mean_kl_nats"] > whole["fidelity"]["mean_kl_nats"]
    with runtime.load(tiny_engine) as verifier:
        options = {"max_new_tokens": 40, "ignore_eos": True}
        plain = verifier.generate("one two three one two", drafter="none", **options)
        fast = verifier.generate("one two three one two", drafter=f"self:{path}", num_draft_tokens=3, **options)
        assert fast.token_ids == plain.token_ids
        assert fast.stats.accepted > 0
