"""Builds of checkpoints that are already quantized: no calibration, their own integers, and what is said of them."""

import json

import numpy as np
import pytest
from onnx import load, numpy_helper

import runtime
from export.build import build
from export.build_options import BuildOptions
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError
from tests.plugins.cpu.operators import needs_library
from tests.prequantized import awq, awq_config, gptq, gptq_config, save_quantized


class Told:
    """A reporter that remembers."""

    def __init__(self):
        self.said = []

    def stage(self, title, detail=""):
        self.said.append(f"{title} {detail}".strip())

    def steps(self, description, total):
        import contextlib

        return contextlib.nullcontext(lambda count: None)


@pytest.fixture(scope="module")
def from_gptq(make_once):
    def fill(folder):
        save_quantized(folder / "model", gptq_config(), gptq())
        told = Told()
        build(BuildOptions(model=str(folder / "model"), output=folder / "engine"), told)
        (folder / "said.json").write_text(json.dumps(told.said))

    return make_once("from-gptq", fill)


def test_a_quantized_checkpoint_is_taken_as_it_is(from_gptq):
    manifest = json.loads((from_gptq / "engine" / "manifest.json").read_text())
    assert manifest["precision"] == "stored"
    assert manifest["linears"].pop("lm_head") == "w8a8-block"
    assert set(manifest["linears"].values()) == {"w4a8"}
    assert manifest["calibration"] == {
        "source": "checkpoint",
        "kept": {"GPTQ, 4 bits in groups of 32": 12},
        "rounded": {"floats": 1},
    }
    said = json.loads((from_gptq / "said.json").read_text())
    assert "calibrate none: weights as GPTQ has them" in said
    assert "12 linears on their own grid (12 of GPTQ, 4 bits in groups of 32); rounded to 8 bits: 1 of floats" in said
    # Activations are rounded, weights are not: the float model has the same.
    assert manifest["fidelity"]["mean_kl_nats"] < 0.01


def test_the_graph_has_the_checkpoint_s_integers(from_gptq):
    tensors = {tensor.name: tensor for tensor in load(from_gptq / "engine" / "verifier.onnx").graph.initializer}
    name = "layers.1.mlp.down_proj"
    values = numpy_helper.to_array(tensors[f"{name}.weight"], str(from_gptq / "engine")).astype(np.int8)
    scale = numpy_helper.to_array(tensors[f"{name}.scale"], str(from_gptq / "engine"))
    expected = open_checkpoint(str(from_gptq / "model")).prequantized(f"{name}.weight")
    np.testing.assert_array_equal(values, expected.values.T)
    np.testing.assert_array_equal(scale, expected.scale.T)


def test_speculation_is_exact(from_gptq):
    with runtime.load(from_gptq / "engine") as engine:
        options = {"max_new_tokens": 32, "seed": 1}
        plain = engine.generate("Count to ten.", drafter="none", **options)
        drafted = engine.generate("Count to ten.", drafter="prompt-lookup", **options)
    assert plain.token_ids == drafted.token_ids


def test_calibration_is_asked_for_by_an_option(tmp_path, few_prompts):
    save_quantized(tmp_path / "model", awq_config(), awq())
    options = BuildOptions(model=str(tmp_path / "model"), output=tmp_path / "engine", calibration=few_prompts)
    manifest = json.loads((build(options) / "manifest.json").read_text())
    assert manifest["precision"].startswith("w8a8")
    assert manifest["calibration"]["source"] == "user"


@needs_library
def test_the_scales_of_a_cache_come_from_the_users_text(tmp_path, tiny_model, few_prompts):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(few_prompts.read_text().splitlines(keepends=True)[:2]))
    found = {}
    for prompts in (few_prompts, own):
        options = BuildOptions(
            model=str(tiny_model),
            output=tmp_path / prompts.stem,
            precision="fp32",
            kv_dtype="int8",
            calibration=prompts,
        )
        found[prompts] = json.loads((build(options) / "manifest.json").read_text())["hashes"]
    for name in ("cache_scales", "inputs"):
        assert found[few_prompts][name] != found[own][name]
    with pytest.raises(BuildError, match="--calibration has no meaning with --precision fp32"):
        build(BuildOptions(model=str(tiny_model), output=tmp_path / "c", precision="fp32", calibration=few_prompts))


@pytest.mark.parametrize("option", [{"alpha": "0.5"}, {"weights": "gptq"}, {"calibration_tokens": 64}])
def test_options_of_calibration_have_no_meaning(tmp_path, tiny_model, option):
    options = BuildOptions(model=str(tiny_model), output=tmp_path / "engine", precision="stored", **option)
    with pytest.raises(BuildError, match=r"has no meaning with --precision stored: leave it out"):
        build(options)
    assert not list(tmp_path.iterdir())
