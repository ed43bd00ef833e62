"""A family that no module knows, registered from here: LFM2 without its convolutions, whose names are its own."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import runtime
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.spec import LayerSpec
from tests.graphs import export_graphs, lowered_session, run_canonical, run_in_chunks
from tests.tiny import VOCABULARY, save_tiny_model


def from_config(config):
    layer = LayerSpec(attention=config.attention(qk_norm="head"), mlp=config.mlp())
    spec = config.decoder("lfm2", [layer] * config.num_layers)
    return dataclasses.replace(spec, rms_norm_eps=float(config.value("norm_eps")))


NAMES = {"input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm", "norm": "embedding_norm"}
NAMES |= {"self_attn.q_norm": "self_attn.q_layernorm", "self_attn.k_norm": "self_attn.k_layernorm"}
NAMES |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
NAMES |= {"self_attn.o_proj": "self_attn.out_proj"}
LFM2 = Architecture(name="lfm2", model_class="Lfm2ForCausalLM", from_config=from_config, weight_names=NAMES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "lfm2", LFM2)
    return save_tiny_model(tmp_path / "model", "lfm2", block_auto_adjust_ff_dim=False)


def test_logits_are_those_of_transformers(folder, tmp_path):
    contract = export_graphs(open_checkpoint(str(folder)), tmp_path)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 90)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert np.abs(expected).max() > 1, "logits so small would agree by accident"
    chunked = run_in_chunks(lowered_session(tmp_path, contract), tokens, 7)
    # float32 sums in another order, through 3 layers.
    np.testing.assert_allclose(chunked, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(run_canonical(tmp_path, contract, tokens), expected, rtol=0, atol=1e-4)


def test_a_quantized_engine_is_built_and_speculates(folder, build_engine):
    with runtime.load(build_engine(folder)) as engine:
        assert engine.manifest.fidelity["mean_kl_nats"] < 0.5
        options = {"max_new_tokens": 24, "ignore_eos": True}
        plain = engine.generate("one two one two", drafter="none", **options)
        assert engine.generate("one two one two", **options).token_ids == plain.token_ids
