"""Offline rotations: the same function, flatter channels, and what cannot be rotated."""

import json

import numpy as np
import pytest
import torch

from calibration.float_model import load_float_model
from calibration.rotation import ROTATION, orthogonal_matrix, rotated
from export.add_head import add_head
from export.build import build
from export.build_options import BuildOptions
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError
from tests.draft_heads import write_random_head
from tests.tiny import VOCABULARY, save_tiny_model

TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, (2, 30))


def logits(checkpoint):
    with torch.inference_mode():
        return load_float_model(checkpoint)(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("size", [1, 2, 3, 16, 24, 64, 96, 576])
def test_the_matrix_is_orthogonal_and_flat(size):
    matrix = orthogonal_matrix(size).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    # A cosine transform's largest entries are the square root of two above the mean.
    assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6
    assert (orthogonal_matrix(size) == orthogonal_matrix(size)).all()


# Biases, norms of queries and keys, scales, a tied head, heads that share.
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "granite", "smollm3", "phi3"])
def test_the_float_model_computes_the_same(tmp_path, architecture):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "model", architecture)))
    expected, found = logits(checkpoint), logits(rotated(checkpoint))
    # Float32: what smoothing is held to.
    assert np.abs(found - expected).max() < 1e-4 * (expected.max() - expected.min())
    names = [name for name in checkpoint.spec.tensors() if name.endswith("proj.weight")]
    turned = rotated(checkpoint)
    assert not any(np.allclose(turned.read(name), checkpoint.read(name), atol=1e-3) for name in names)
    assert (turned.read("layers.0.input_layernorm.weight") == 1).all()
    assert not turned.spec.tied_head


def test_a_channel_that_stands_out_is_spread(tmp_path):
    """What a row's amax is, beside its root mean square: the rounding error of 4 bits goes with it."""
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "model", "llama")))

    class WithOutliers:
        spec = checkpoint.spec

        def read(self, name):
            tensor = np.array(checkpoint.read(name), np.float32)
            if name == "layers.0.input_layernorm.weight":
                tensor[3] *= 50
            return tensor

    def peak(one):
        weight = one.read("layers.0.self_attn.q_proj.weight")
        if isinstance(one, WithOutliers):
            weight = weight * one.read("layers.0.input_layernorm.weight")
        return np.median(np.abs(weight).max(axis=1) / np.sqrt(np.square(weight).mean(axis=1)))

    assert peak(WithOutliers()) > 2 * peak(rotated(WithOutliers()))


def test_norms_on_what_is_added_are_refused(tmp_path):
    for architecture in ("gemma2", "olmo2"):
        checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / architecture, architecture)))
        with pytest.raises(BuildError, match=f"--rotate came, and layer 0 of {architecture} has norms after"):
            rotated(checkpoint)


@pytest.mark.parametrize("precision", ["fp32", "stored"])
def test_it_needs_weights_that_are_rounded(tmp_path, tiny_model, precision):
    options = BuildOptions(model=str(tiny_model), output=tmp_path / "engine", precision=precision, rotate=True)
    with pytest.raises(BuildError, match=f"--rotate has no meaning with --precision {precision}"):
        build(options)


def test_an_engine_says_that_it_is_rotated(shared_engine, tiny_model, tmp_path):
    engine = shared_engine(tiny_model, precision="w4a8", rotate=True)
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["calibration"]["rotation"] == ROTATION
    assert manifest["hashes"]["cache_rotation"] == ROTATION
    write_random_head(tmp_path / "head", tiny_model)
    with pytest.raises(BuildError, match="the engine was built with --rotate, and a draft head reads"):
        add_head(engine, tmp_path / "head")
