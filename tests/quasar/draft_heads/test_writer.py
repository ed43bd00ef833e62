"""Heads that are written are read again, by us and under the names that others read."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from quasar.checkpoints.spec import Rope
from quasar.draft_heads.folder import open_draft_head
from quasar.draft_heads.writer import write_draft_head
from quasar.errors import CheckpointError
from tests.quasar.draft_heads.published_heads import SafeAilabEagle, SafeAilabEagle3, published
from tests.quasar.draft_heads.test_layouts import LAYOUTS, target_spec


def opened(folder, layout):
    make, options = LAYOUTS[layout]
    theirs = published(make, **options)
    return open_draft_head(theirs.save(folder), target_spec(theirs.target_hidden)), target_spec(theirs.target_hidden)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_head_is_read_again(layout, tmp_path):
    head, target = opened(tmp_path / "theirs", layout)
    tensors = {name: head.read(name).astype(ml_dtypes.bfloat16) for name in head.spec.tensors()}
    write_draft_head(tmp_path / "ours", head.spec, tensors, head.targets, "someone/target")
    again = open_draft_head(tmp_path / "ours", target)
    assert again.spec == head.spec
    assert again.base_model == "someone/target"
    assert again.targets.tolist() == head.targets.tolist()
    for name, value in tensors.items():
        assert again.read(name).tobytes() == value.tobytes()
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


def test_names_and_keys_are_those_that_others_read(tmp_path):
    theirs = published(SafeAilabEagle3)
    head = open_draft_head(theirs.save(tmp_path / "theirs"), target_spec())
    tensors = {name: head.read(name) for name in head.spec.tensors()}
    write_draft_head(tmp_path / "ours", head.spec, tensors, head.targets, "")
    stored = load_file(tmp_path / "ours/model.safetensors")
    assert stored.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert stored[name].dtype == value.numpy().dtype
        np.testing.assert_array_equal(stored[name], value.numpy())
    assert json.loads((tmp_path / "ours/config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "draft_vocab_size": 40,
        "eagle_aux_hidden_state_layer_ids": [2, 5, 7],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 6], "use_aux_hidden_state": True},
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
    }


def test_eagle_keeps_safeailabs_names(tmp_path):
    theirs = published(SafeAilabEagle)
    head = open_draft_head(theirs.save(tmp_path / "theirs"), target_spec())
    tensors = {name: head.read(name) for name in head.spec.tensors()}
    write_draft_head(tmp_path / "ours", head.spec, tensors, head.targets, "")
    assert load_file(tmp_path / "ours/model.safetensors").keys() == theirs.state_dict().keys()
    assert json.loads((tmp_path / "ours/config.json").read_text())["bias"] is True


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=1e6, kind="linear", factor=4.0),
        Rope(theta=1e6, kind="yarn", factor=4.0, original_context_length=64, beta_fast=16.0),
        Rope(theta=1e6, kind="yarn", factor=4.0, original_context_length=64, attention_factor=1.5, truncate=False),
        Rope(theta=1e6, kind="llama3", factor=8.0, original_context_length=64, low_freq_factor=2.0),
    ],
    ids=lambda rope: rope.kind,
)
def test_ropes(rope, tmp_path):
    head, target = opened(tmp_path / "theirs", "SafeAILab EAGLE-3")
    layer = head.spec.decoder.layers[0]
    layers = (replace(layer, attention=replace(layer.attention, rope=rope)),)
    spec = replace(head.spec, decoder=replace(head.spec.decoder, layers=layers))
    write_draft_head(tmp_path / "ours", spec, {name: head.read(name) for name in spec.tensors()}, head.targets, "")
    assert open_draft_head(tmp_path / "ours", target).spec == spec


def test_what_the_layout_has_no_word_for_is_refused(tmp_path):
    head, _ = opened(tmp_path / "theirs", "SafeAILab EAGLE-3")
    tensors = {name: head.read(name) for name in head.spec.tensors()}
    decoder = head.spec.decoder
    layer = decoder.layers[0]
    capped = (replace(layer, attention=replace(layer.attention, softcap=30.0)),)
    for values, piece in (
        ({"decoder": replace(decoder, embedding_scale=2.0)}, "embedding_scale 2.0 of a draft head that is written"),
        ({"decoder": replace(decoder, layers=capped)}, "unsupported option: layers "),
        ({"normed": True}, "unsupported option: normed True of a draft head that is written; its config.json would be"),
    ):
        with pytest.raises(CheckpointError, match=piece):
            write_draft_head(tmp_path / "ours", replace(head.spec, **values), tensors, head.targets, "")
    assert not (tmp_path / "ours").exists()


def test_tensors_and_tokens_that_are_not_the_specs(tmp_path):
    head, _ = opened(tmp_path / "theirs", "SafeAILab EAGLE-3")
    tensors = {name: head.read(name) for name in head.spec.tensors()}
    for wrong, targets, piece in (
        (
            {**tensors, "extra": np.zeros(2)},
            head.targets,
            r"'extra' of the draft head has shape \(2,\); its spec asks for",
        ),
        ({**tensors, "fc.weight": np.zeros(2)}, head.targets, r"'fc.weight' of the draft head has shape \(2,\)"),
        ({"fc.weight": tensors["fc.weight"]}, head.targets, "has shape None; its spec asks for"),
        (tensors, head.targets[1:], r"\(39,\) tokens for a draft head that drafts 40"),
        (tensors, head.targets[::-1], "the draft head names the token .* ascending tokens were expected"),
        (tensors, head.targets + 96, "the draft head names the token .* the model has tokens 0 to 95"),
    ):
        with pytest.raises(CheckpointError, match=piece):
            write_draft_head(tmp_path / "ours", head.spec, wrong, targets, "")
