"""Every architecture against transformers' own logits, whole and in chunks; lowered against canonical graphs."""

import dataclasses

import numpy as np
import pytest
import torch

from calibration.float_model import load_float_model
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.checkpoint import at_length
from quasar.checkpoints.config import spec_from_config
from tests.graphs import export_graphs, lowered_session, run_canonical, run_in_chunks
from tests.tiny import VOCABULARY, reference_model, save_tiny_model, tiny_torch_model

# float32 sums in another order: a few units in the last place of logits of about 10, through 3 layers.
TOLERANCE = 1e-4

# Such that they change the logits: scores of a tiny model are small.
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.5,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + pair / 4 for pair in range(8)],
    "long_factor": [1.0 + pair for pair in range(8)],
}

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
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "mistral-full": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "hidden_size": 128, "sliding_window": 16}),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": 64, "rope_scaling": LONGROPE}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 24, **CAPS}),
    "gemma2-tied-biases": ("gemma2", {"sliding_window": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "gemma2-wide-heads": ("gemma2", {"sliding_window": 16, "head_dim": 256, **CAPS}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 24}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "sliding_window": 16,
            "head_dim": 32,
            "final_logit_softcapping": 4.0,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-windows": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 16,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "granite": ("granite", MULTIPLIERS),
    "granite-biases": (
        "granite",
        {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "openpangu": ("PanguEmbedded", {}),
    "internlm2": ("internlm2", {}),
    "internlm2-biases": ("internlm2", {"attention_bias": True, "num_key_value_heads": 1}),
    "internlm3": ("internlm3", {}),
    "internlm3-biases": ("internlm3", {"attention_bias": True, "mlp_bias": True}),
    "seed-oss": ("seed_oss", {}),
    "seed-oss-biases": ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
}
# Families whose quantized graph is lowered; the first three with `make test`.
QUANTIZED = ("llama", "qwen2", "qwen3", "gemma2", "olmo2", "granite", "seed_oss")
# One for each operation that a family brings; the others run with `make test-full`.
SAMPLE = (
    "llama",
    "qwen3-wide-heads",
    "phi3-partial",
    "gemma2",
    "gemma3",
    "smollm3-windows",
    "granite",
    "olmo2",
    "internlm2",
)


def check_logits(name, folder, sizes):
    """Logits of canonical and lowered graph against transformers' own, the tokens fed `size` at a time."""
    architecture, overrides = MODELS[name]
    model_folder = save_tiny_model(folder / "model", architecture, **overrides)
    checkpoint = at_length(open_checkpoint(str(model_folder)), 448)
    contract = export_graphs(checkpoint, folder)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 90)
    with torch.inference_mode():
        expected = reference_model(model_folder)(torch.from_numpy(tokens)[None]).logits[0].numpy()
        filled = load_float_model(checkpoint)(torch.from_numpy(tokens)[None]).logits[0].numpy()

    assert np.abs(expected).max() > 1, "logits so small would agree by accident"
    np.testing.assert_allclose(filled, expected, rtol=0, atol=TOLERANCE)
    session = lowered_session(folder, contract)
    for size in sizes:
        np.testing.assert_allclose(run_in_chunks(session, tokens, size), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(run_canonical(folder, contract, tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SAMPLE)
def test_logits_are_those_of_transformers(name, tmp_path):
    check_logits(name, tmp_path, (90, 7))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_for_every_option(name, tmp_path):
    check_logits(name, tmp_path, (90, 1, 2, 7))


def test_chunked_prefill_is_bit_identical_to_unchunked(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen3")
    contract = export_graphs(open_checkpoint(str(folder)), tmp_path)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, 150)
    session = lowered_session(tmp_path, contract)
    whole = run_in_chunks(session, tokens, len(tokens))
    for size in (1, 7, 64):
        np.testing.assert_array_equal(run_in_chunks(session, tokens, size), whole)


@pytest.mark.parametrize(
    "architecture", [*QUANTIZED[:3], *(pytest.param(name, marks=pytest.mark.full) for name in QUANTIZED[3:])]
)
def test_lowering_keeps_the_quantized_graph(architecture, tmp_path):
    """Integer parts are exact, but float attention differs in its last bits, and per-token rounding amplifies that: a
    rounding that flips moves logits by about a quantization step (seen: 0.008 of their spread, in one text of three at
    most). So most texts must agree much better than a step, and none may be further off than flips explain."""
    folder = save_tiny_model(tmp_path / "model", architecture)
    contract = export_graphs(open_checkpoint(str(folder)), tmp_path, precision="w8a8")
    session, errors = lowered_session(tmp_path, contract), []
    for seed in range(3, 8):
        tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 60)
        canonical = run_canonical(tmp_path, contract, tokens)
        lowered = run_in_chunks(session, tokens, len(tokens))
        errors.append(np.abs(lowered - canonical).mean() / np.abs(canonical).std())
    assert np.median(errors) < 1e-3
    assert max(errors) < 2e-2


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
