"""Every architecture against transformers' own logits, whole and in chunks; lowered against canonical graphs."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.config import spec_from_config
from tests.graphs import export_graphs, lowered_session, run_canonical, run_in_chunks
from tests.tiny import VOCABULARY, save_tiny_model, tiny_torch_model

# float32 sums in another order: a few units in the last place of logits of about 10, through 3 layers.
TOLERANCE = 1e-4

MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 256, "num_hidden_layers": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    architecture, overrides = MODELS[name]
    folder = save_tiny_model(tmp_path / "model", architecture, **overrides)
    checkpoint = open_checkpoint(str(folder))
    contract = export_graphs(checkpoint, tmp_path)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 90)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()

    assert np.abs(expected).max() > 1, "logits so small would agree by accident"
    session = lowered_session(tmp_path, contract)
    for size in (len(tokens), 1, 2, 7):
        np.testing.assert_allclose(run_in_chunks(session, tokens, size), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(run_canonical(tmp_path, contract, tokens), expected, rtol=0, atol=TOLERANCE)


def test_chunked_prefill_is_bit_identical_to_unchunked(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen3")
    contract = export_graphs(open_checkpoint(str(folder)), tmp_path)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, 150)
    session = lowered_session(tmp_path, contract)
    whole = run_in_chunks(session, tokens, len(tokens))
    for size in (1, 7, 64):
        np.testing.assert_array_equal(run_in_chunks(session, tokens, size), whole)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_lowering_keeps_the_quantized_graph(architecture, tmp_path):
    """Integer parts are exact, but float attention differs in its last bits, and per-token rounding amplifies that:
    a flipped rounding moves a logit by about one quantization step, so the mean error is what must be small."""
    folder = save_tiny_model(tmp_path / "model", architecture)
    contract = export_graphs(open_checkpoint(str(folder)), tmp_path, precision="w8a8")
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 60)
    canonical = run_canonical(tmp_path, contract, tokens)
    lowered = run_in_chunks(lowered_session(tmp_path, contract), tokens, len(tokens))
    assert np.abs(lowered - canonical).mean() < 5e-3 * np.abs(canonical).std()


class InMemory:
    """A checkpoint that is a torch model, whose layers may differ."""

    def __init__(self, spec, model):
        self.spec, self.location, self._model = spec, "memory", model

    def read(self, name):
        module, _, parameter = name.rpartition(".")
        owner = self._model.lm_head if module == "lm_head" else self._model.model.get_submodule(module)
        return getattr(owner, parameter).detach().numpy()


def test_layers_of_one_model_may_differ(tmp_path):
    model = tiny_torch_model("llama")
    other = tiny_torch_model("llama", 1, intermediate_size=160, mlp_bias=True, attention_bias=True)
    model.model.layers[1] = other.model.layers[1]
    specs = [
        spec_from_config({**one.config.to_dict(), "architectures": ["LlamaForCausalLM"]}, {}) for one in (model, other)
    ]
    spec = dataclasses.replace(specs[0], layers=(specs[0].layers[0], specs[1].layers[1], specs[0].layers[2]))
    contract = export_graphs(InMemory(spec, model), tmp_path)
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, 40)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    session = lowered_session(tmp_path, contract)
    np.testing.assert_allclose(run_in_chunks(session, tokens, 7), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(run_canonical(tmp_path, contract, tokens), expected, rtol=0, atol=TOLERANCE)
