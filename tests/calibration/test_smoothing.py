"""Smoothing changes the numbers of a model, but not the function that it computes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.fake_quantization import module_of
from calibration.float_blocks import FloatBlocks
from calibration.float_model import load_float_model
from calibration.smoothing import (
    SmoothingFactors,
    fold,
    group_factor,
    shared_over_query_group,
    smoothing_factor,
    takes_factor,
)
from calibration.statistics import BlockWatch
from calibration.weights import in_graph
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.checkpoint import read_float32
from tests.tiny import VOCABULARY, save_tiny_model

MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}),
    "granite": ("granite", {"residual_multiplier": 0.6, "logits_scaling": 0.5, "mlp_bias": True}),
    "olmo2": ("olmo2", {}),
}


def factors_of(checkpoint, skip=frozenset()):
    """Factors far from one, as a model with outliers has them."""
    random = np.random.default_rng(4)
    factors = {}
    for linear in checkpoint.spec.linears():
        amax = random.uniform(0.1, 50, linear.inputs)
        weight = np.concatenate([read_float32(checkpoint, f"{member}.weight") for member in linear.members])
        if linear.name not in skip and takes_factor(checkpoint.spec, linear.name):
            factors[linear.name] = group_factor(checkpoint.spec, linear.name, amax, np.abs(weight).max(axis=0), 0.6)
    return SmoothingFactors(by_linear=factors)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_float_model_is_unchanged(name, dtype, tolerance, tmp_path):
    """To 1e-10 of the logits' range in float64, 1e-4 in float32; Gemma's norms are float32 whatever the model is."""
    architecture, overrides = MODELS[name]
    tolerance = max(tolerance, 1e-5) if architecture == "gemma2" else tolerance
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, architecture, **overrides)))
    factors = factors_of(checkpoint)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, 40)))
    model = load_float_model(checkpoint).to(dtype)
    with torch.inference_mode():
        before = model(tokens).logits.numpy()
    # The head is smoothed as a tensor of its own, also where it is tied.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    names = [*checkpoint.spec.tensors(), *(["lm_head.weight"] if checkpoint.spec.tied_head else [])]
    changed = 0
    for tensor_name in names:
        module, _, parameter = tensor_name.rpartition(".")
        owner = module_of(model, module)
        tensor = getattr(owner, parameter).detach().numpy()
        # The graph's tensors hold what transformers' modules add and multiply themselves: that is taken out again.
        added = in_graph(tensor_name, np.zeros_like(tensor), checkpoint.spec)
        factor = in_graph(tensor_name, np.ones_like(tensor), checkpoint.spec) - added
        folded = fold(tensor_name, in_graph(tensor_name, tensor, checkpoint.spec), checkpoint.spec, factors)
        folded = (folded - added) / factor
        assert folded.shape == tensor.shape
        changed += not np.allclose(folded, tensor, rtol=1e-3)
        with torch.no_grad():
            getattr(owner, parameter).copy_(torch.from_numpy(np.ascontiguousarray(folded)))
    with torch.inference_mode():
        after = model(tokens).logits.numpy()
    # The members of every linear that has a factor; what it is taken from as well, which may be a member of another.
    smoothed = [linear for linear in checkpoint.spec.linears() if factors.of(linear.name) is not None]
    assert changed >= sum(len(linear.members) for linear in smoothed) + 1
    assert np.abs(after - before).max() <= tolerance * (before.max() - before.min())


def test_query_heads_of_a_group_share_their_factor(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama")))
    spec = checkpoint.spec
    s = factors_of(checkpoint).of("layers.0.self_attn.o_proj").reshape(spec.num_kv_heads, -1, spec.head_size)
    np.testing.assert_array_equal(s[:, 0], s[:, 1])
    per_channel = np.arange(spec.layers[0].attention.query_size, dtype=np.float64)
    shared = shared_over_query_group(per_channel, spec).reshape(s.shape)
    np.testing.assert_array_equal(shared[:, 0], per_channel.reshape(s.shape)[:, 1])


def test_float_linears_are_left_alone(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama")))
    factors = factors_of(checkpoint, skip=frozenset({"layers.1.mlp.down_proj", "lm_head"}))
    assert factors.of("lm_head") is None
    for name in ("layers.1.mlp.down_proj.weight", "lm_head.weight", "norm.weight"):
        tensor = checkpoint.read(name)
        np.testing.assert_array_equal(fold(name, tensor, checkpoint.spec, factors), tensor)
    assert fold("embed_tokens.weight", checkpoint.read("embed_tokens.weight"), checkpoint.spec, factors).any()


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1))
def test_factor_is_positive_and_finite(x, w, alpha):
    s = smoothing_factor(np.array([x]), np.array([w]), alpha)
    assert np.isfinite(s).all()
    assert (s > 0).all()


def test_factor_is_smoothquants():
    s = smoothing_factor(np.array([16.0, 1e-9]), np.array([4.0, 4.0]), 0.5)
    np.testing.assert_allclose(s, [2.0, np.sqrt(1e-5) / 2])
    np.testing.assert_allclose(smoothing_factor(np.array([16.0]), np.array([4.0]), 1.0), [16.0])
    assert SmoothingFactors().of("lm_head") is None


def test_statistics_are_the_maxima_that_torch_sees(tmp_path):
    """Against a loop over single sequences, without batches and padding."""
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama")))
    model, spec = load_float_model(checkpoint), checkpoint.spec
    random = np.random.default_rng(8)
    texts = [random.integers(0, VOCABULARY, length).tolist() for length in (3, 17, 40, 5)]
    blocks, found = FloatBlocks(checkpoint), {}
    embedded = blocks.embed({"": texts})[""]
    streams = [hidden for _, hidden in embedded]
    for index in range(spec.num_layers):
        watch = BlockWatch(blocks.model, spec, index, every=1)
        with blocks.block(index), watch.watching():
            for number, (batch, _) in enumerate(embedded):
                watch.real = batch.real
                streams[number] = blocks.run_block(index, batch, streams[number])
        found |= watch.inputs
    seen = {}

    def watch_all(name):
        def hook(module, arguments):
            amax = arguments[0][0].abs().amax(dim=0)
            seen[name] = torch.maximum(seen[name], amax) if name in seen else amax

        return hook

    linears = [linear for linear in spec.linears() if linear.name != "lm_head"]
    for linear in linears:
        model.model.get_submodule(linear.members[0]).register_forward_pre_hook(watch_all(linear.name))
    with torch.inference_mode():
        for text in texts:
            model(torch.tensor([text]))
    assert set(seen) == set(found) == {linear.name for linear in linears}
    for name, amax in seen.items():
        # Batched float32 sums run in another order.
        np.testing.assert_allclose(found[name].amax.numpy(), amax.numpy(), rtol=1e-4, atol=1e-5)
        assert sum(map(len, found[name].parts)) == 65
