"""Folders of draft heads: what is read, how, and what is refused in one sentence."""

import json
import os
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quasar.draft_heads.folder import open_draft_head
from quasar.errors import CheckpointError
from tests.quasar.draft_heads.published_heads import (
    DRAFTED,
    HIDDEN,
    VOCABULARY,
    AngelSlimEagle3,
    ModelOptEagle3,
    SafeAilabEagle,
    SafeAilabEagle3,
    SpecForgeEagle3,
    SpeculatorsEagle3,
    published,
)
from tests.quasar.draft_heads.test_layouts import target_spec


@pytest.fixture
def folder(tmp_path):
    return published(SafeAilabEagle3).save(tmp_path / "head")


def change_config(folder, **values):
    """Options of config.json; a value of a nested object by `outer__inner`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in values.items():
        inner = config
        *outer, last = name.split("__")
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    path.write_text(json.dumps(config))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder, *pieces, target=None):
    """Opening raises one sentence with all the pieces."""
    with pytest.raises(CheckpointError) as caught:
        open_draft_head(folder, target or target_spec())
    message = str(caught.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message
    return message


def test_safeailab_head(folder):
    head = open_draft_head(folder, target_spec())
    assert head.location == folder
    assert head.files == (folder / "config.json", folder / "model.safetensors")
    assert head.base_model == ""
    spec = head.spec
    assert (spec.kind, spec.feature_layers, spec.num_features) == ("eagle3", (2, 5, 7), 3 * HIDDEN)
    assert (spec.own_embedding, spec.own_head, spec.normed, spec.norm_output) == (False, True, False, False)
    # Training text is short; the target decides how far a head goes.
    assert spec.decoder.context_length == 256
    assert head.targets.dtype == np.int64


def test_tensors_keep_their_precision(folder):
    change_tensors(folder, lambda tensors: tensors.update({"fc.weight": tensors["fc.weight"].astype("bfloat16")}))
    head = open_draft_head(folder, target_spec())
    assert head.read("fc.weight").dtype == ml_dtypes.bfloat16
    assert head.read("norm.weight").dtype == np.float32


def test_weights_are_read_when_they_are_asked_for(folder):
    def change(tensors):
        tensors["fc.weight"][0, 0] = np.nan

    change_tensors(folder, change)
    head = open_draft_head(folder, target_spec())
    assert np.isfinite(head.read("norm.weight")).all()
    with pytest.raises(CheckpointError, match=r"fc\.weight holds values that are not finite: download it again"):
        head.read("fc.weight")


def test_base_model_of_speculators(tmp_path):
    head = open_draft_head(published(SpeculatorsEagle3).save(tmp_path), target_spec())
    assert head.base_model == "someone/target"
    assert head.spec.decoder.layers[0].attention.qk_norm == "head"
    assert (head.spec.norm_before_residual, head.spec.feature_norm) == (True, "all")


def test_window_of_the_layer(tmp_path):
    folder = published(SpeculatorsEagle3).save(tmp_path)
    change_config(
        folder,
        transformer_layer_config__layer_types=["sliding_attention"],
        transformer_layer_config__sliding_window=32,
    )
    assert open_draft_head(folder, target_spec()).spec.decoder.layers[0].attention.window == 32


def test_eagle_reads_what_the_target_head_reads(tmp_path):
    spec = open_draft_head(published(SafeAilabEagle).save(tmp_path), target_spec()).spec
    assert (spec.kind, spec.feature_layers, spec.normed, spec.own_head) == ("eagle", (10,), True, False)
    assert (spec.fuse_bias, spec.own_embedding, spec.draft_vocab_size) == (True, True, VOCABULARY)


def test_options_of_the_target_are_not_the_heads(tmp_path):
    spec = open_draft_head(published(AngelSlimEagle3).save(tmp_path), target_spec()).spec
    attention = spec.decoder.layers[0].attention
    assert (attention.qkv_bias, attention.qk_norm, attention.window) == (False, None, None)
    assert (spec.own_head, spec.decoder.tied_head) == (True, False)


def test_first_name_of_the_norm_of_each_state(tmp_path):
    folder = published(SpecForgeEagle3).save(tmp_path)
    change_config(folder, fc_norm=None, use_aux_norm=True)
    assert open_draft_head(folder, target_spec(64)).spec.feature_norm == "each"


def test_share_of_a_head_that_rotates(tmp_path):
    """Speculators makes its layer by transformers, which has the option."""
    folder = published(SpeculatorsEagle3).save(tmp_path)
    change_config(folder, transformer_layer_config__head_dim=32, transformer_layer_config__partial_rotary_factor=0.5)
    change_config(folder, transformer_layer_config__num_attention_heads=2)
    change_config(folder, transformer_layer_config__num_key_value_heads=1)

    def change(tensors):
        for part in "qk":
            tensors[f"layers.0.self_attn.{part}_norm.weight"] = np.ones(32, np.float32)

    change_tensors(folder, change)
    rope = open_draft_head(folder, target_spec()).spec.decoder.layers[0].attention.rope
    assert (rope.rotary_size, rope.theta) == (16, 2e4)


# Which layers.


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({}, (2, 5, 7)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 5, 10]}, (1, 5, 10)),
        ({"eagle_config__eagle_aux_hidden_state_layer_ids": [1, 5, 9]}, (2, 6, 10)),
        ({"eagle_config__eagle_aux_hidden_state_layer_ids": []}, (2, 5, 7)),
        (
            {
                "eagle_aux_hidden_state_layer_ids": [0, 2, 3],
                "eagle_config__eagle_aux_hidden_state_layer_ids": [-1, 1, 2],
            },
            (0, 2, 3),
        ),
    ],
)
def test_feature_layers(folder, values, layers):
    change_config(folder, **values)
    assert open_draft_head(folder, target_spec()).spec.feature_layers == layers


def test_layers_counted_in_two_ways_must_agree(folder):
    both = {"eagle_aux_hidden_state_layer_ids": [1, 4, 6]}
    change_config(folder, **both, **{"eagle_config__" + name: value for name, value in both.items()})
    refused(folder, "[1, 4, 6], the layers that are entered, and [1, 4, 6] in eagle_config, the layers that are left")


@pytest.mark.parametrize(
    ("layers", "piece"),
    [
        ([7, 5, 2], "[7, 5, 2]; different layers, the first one first, were expected"),
        ([2, 2, 5], "[2, 2, 5]; different layers, the first one first, were expected"),
        ([2, 5, 11], "reads what enters the layers [2, 5, 11]; the model has 10"),
        ([-1, 5, 7], "reads what enters the layers [-1, 5, 7]; the model has 10"),
        ("2", "eagle_aux_hidden_state_layer_ids is '2'; numbers of layers were expected"),
        ([True, 2, 5], "eagle_aux_hidden_state_layer_ids is [True, 2, 5]; numbers of layers were expected"),
    ],
)
def test_layers_that_are_none(folder, layers, piece):
    change_config(folder, eagle_aux_hidden_state_layer_ids=layers)
    refused(folder, piece)


def test_small_target_has_no_default_layers(folder):
    refused(folder, "[2, 2, 1]; different layers, the first one first, were expected", target=target_spec(layers=4))


# Options that no graph can express.


@pytest.mark.parametrize(
    ("values", "piece"),
    [
        ({"num_hidden_layers": 2}, "unsupported option: num_hidden_layers 2; a draft head of one was expected"),
        ({"hidden_act": "relu"}, "unsupported hidden_act 'relu'; supported are silu"),
        ({"medusa_num_heads": 3}, "unsupported option: medusa_num_heads 3 in a draft head"),
        ({"hydra_num_heads": 3}, "unsupported option: hydra_num_heads 3 in a draft head"),
        ({"kv_lora_rank": 512}, "unsupported option: kv_lora_rank 512 in a draft head"),
        ({"dflash_config": {"block_size": 8}}, "unsupported option: dflash_config {'block_size': 8} in a draft head"),
        ({"ptd_token_id": 7}, "unsupported option: ptd_token_id 7 in a draft head"),
        ({"add_para_norm": True}, "unsupported option: add_para_norm True in a draft head"),
        ({"early_stop_method": "progress"}, "unsupported option: early_stop_method 'progress' in a draft head"),
        ({"logit_scale": 2.0}, "unsupported option: logit_scale 2.0 in a draft head"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quant_method': 'fp8'}"),
        (
            {"eagle_config__use_aux_hidden_state": False},
            "unsupported option: use_aux_hidden_state False in a draft head",
        ),
        ({"eagle_config__use_last_layernorm": False}, "unsupported option: use_last_layernorm False in a draft head"),
        ({"eagle_config__use_mtp_layernorm": True}, "unsupported option: use_mtp_layernorm True in a draft head"),
        ({"eagle_config__eh_proj_before_attn": True}, "unsupported option: eh_proj_before_attn True in a draft head"),
        ({"eagle_config__parallel_draft_step": 4}, "unsupported option: parallel_draft_step 4 in a draft head"),
        (
            {"eagle_config__use_input_layernorm_in_first_layer": False},
            "unsupported option: use_input_layernorm_in_first_layer False in a draft head",
        ),
        ({"norm_before_fc": True, "fc_norm": True}, "unsupported option: norm_before_fc True beside fc_norm True"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
            "unsupported option: mrope_section [16, 24, 24] in a draft head's rope scaling",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
            "unsupported option: alpha 1000.0 in a draft head's rope scaling",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "unsupported option: rope scaling 'dynamic' from 64 positions on; the model has 256",
        ),
        ({"rope_scaling": {"type": "other"}}, "unsupported rope scaling 'other'; supported are default"),
        ({"partial_rotary_factor": 0.5}, "unsupported option: partial_rotary_factor 0.5"),
        (
            {"architectures": ["MedusaModel"]},
            "unsupported draft head: MedusaModel; supported are LlamaForCausalLMEagle",
        ),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "unsupported draft head: Eagle3DeepseekV2ForCausalLM;"),
        ({"architectures": ["DeepseekV3ForCausalLMNextN"]}, "unsupported draft head: DeepseekV3ForCausalLMNextN;"),
        ({"speculators_model_type": "peagle"}, "speculators_model_type 'peagle'; 'eagle3' was expected"),
        ({"hidden_size": None}, "config.json: hidden_size is None; a positive integer was expected"),
        ({"rms_norm_eps": "small"}, "config.json holds a value of the wrong kind"),
        ({"eagle_config": 3}, "config.json: eagle_config is 3; a JSON object was expected"),
        (
            {"draft_vocab_size": VOCABULARY + 1},
            "the draft head drafts 97 tokens of 96: draft_vocab_size and vocab_size",
        ),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 kv heads evenly"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_refused_by_name(folder, values, piece):
    change_config(folder, **values)
    assert refused(folder, piece).startswith(f"{folder}: ")


@pytest.mark.parametrize(
    ("values", "piece"),
    [
        (
            {"transformer_layer_config__model_type": "gemma3"},
            "unsupported option: model_type 'gemma3' of a draft head's",
        ),
        ({"norm_before_residual": None}, "norm_before_residual is missing; true or false was expected"),
        ({"transformer_layer_config": 3}, "transformer_layer_config is 3; a JSON object was expected"),
        ({"transformer_layer_config__num_hidden_layers": 3}, "unsupported option: num_hidden_layers 3"),
        ({"speculators_config__verifier": "name"}, "config.json: verifier is 'name'; a JSON object was expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_of_speculators(tmp_path, values, piece):
    folder = published(SpeculatorsEagle3).save(tmp_path)
    change_config(folder, **values)
    refused(folder, piece)


@pytest.mark.parametrize("parts", [("self_attn.q_norm", "self_attn.k_norm"), ("self_attn.q_proj", "self_attn.o_proj")])
def test_speculators_configs_say_what_is_there(tmp_path, parts):
    """Norms of Qwen3, biases: a tensor that is lost is no option that is off."""
    folder = published(SpeculatorsEagle3).save(tmp_path)
    lost = [f"layers.0.{part}.{'weight' if 'norm' in part else 'bias'}" for part in parts]

    def change(tensors):
        for name in lost:
            del tensors[name]

    change_tensors(folder, change)
    refused(folder, f"the tensor {lost[0]!r} is missing")


def test_biases_of_the_mlp_that_speculators_config_says(tmp_path):
    folder = published(SpeculatorsEagle3).save(tmp_path)
    change_config(folder, transformer_layer_config__mlp_bias=True)
    refused(folder, "the tensor 'layers.0.mlp.gate_proj.bias' is missing")


def test_experts_are_refused(folder):
    change_config(folder, num_local_experts=4)
    change_tensors(folder, lambda tensors: tensors.update({"midlayer.mlp.experts.0.up_proj.weight": np.zeros(4)}))
    refused(folder, "unsupported option: num_local_experts 4, experts in a draft head (layers.0.mlp.experts.0.up_proj")


def test_tied_head_is_refused(tmp_path):
    folder = published(ModelOptEagle3).save(tmp_path)
    change_config(folder, tie_word_embeddings=True)
    refused(folder, "unsupported option: tie_word_embeddings True in a draft head without an LM head")


# Another target.


def test_another_hidden_size(folder):
    refused(folder, "reads hidden states of 48 values, the model's have 64: the head is of another model",
            target=target_spec(hidden_size=64))  # fmt: skip


def test_another_vocabulary(folder):
    refused(
        folder, "is fed 96 ids, the model has 128: the head is of another model", target=target_spec(vocab_size=128)
    )


def test_the_base_model_is_named(tmp_path):
    folder = published(SpeculatorsEagle3).save(tmp_path)
    message = refused(folder, target=target_spec(vocab_size=128))
    assert message.endswith("the head is of another model; config.json says that it was trained for someone/target")


def test_embedding_of_another_size(tmp_path):
    folder = published(SpecForgeEagle3).save(tmp_path)
    change_tensors(folder, lambda tensors: tensors.pop("embed_tokens.weight"))
    refused(
        folder, "has no embedding of its own, and the model's has 64 values a token, not 48", target=target_spec(64)
    )


def test_eagle_cannot_read_a_state_of_another_size(tmp_path):
    folder = published(SafeAilabEagle).save(tmp_path)
    change_config(folder, target_hidden_size=64)
    refused(folder, "one has 64 values, the other 48", target=target_spec(64))


# Which tokens are drafted.


def set_mapping(folder, d2t=None, t2d=None):
    def change(tensors):
        for name, value in (("d2t", d2t), ("t2d", t2d)):
            if value is not None:
                tensors[name] = np.asarray(value)

    change_tensors(folder, change)


def test_mapping_is_missing(folder):
    change_tensors(folder, lambda tensors: tensors.pop("d2t"))
    refused(folder, "the tensor 'd2t' is missing, which says which 40 of the 96 tokens the head drafts: download")


@pytest.mark.parametrize(
    ("change", "piece"),
    [
        (lambda d2t: d2t[:-1], "d2t has shape [39]; the config asks for [40]"),
        (lambda d2t: d2t + VOCABULARY, "the model has tokens 0 to 95"),
        (lambda d2t: d2t - VOCABULARY, "the model has tokens 0 to 95"),
        (lambda d2t: np.where(np.arange(DRAFTED) == 3, d2t[2] - 1, d2t), "; ascending tokens were expected"),
        (lambda d2t: np.where(np.arange(DRAFTED) == 3, d2t[2] - 2, d2t), "; ascending tokens were expected"),
        (lambda d2t: d2t.astype(np.float32), "d2t is stored as F32; integers were expected"),
    ],
    ids=["short", "above", "below", "twice", "descending", "float"],
)
def test_mapping_is_wrong(folder, change, piece):
    set_mapping(folder, d2t=change(load_file(folder / "model.safetensors")["d2t"]))
    refused(folder, piece)


def test_the_token_that_is_outside_is_named(folder):
    d2t = load_file(folder / "model.safetensors")["d2t"]
    d2t[-1] = VOCABULARY - (DRAFTED - 1)
    set_mapping(folder, d2t=d2t)
    refused(folder, f"{folder}: d2t names the token 96; the model has tokens 0 to 95")


def test_mappings_contradict_each_other(folder):
    t2d = load_file(folder / "model.safetensors")["t2d"]
    t2d[np.flatnonzero(~t2d)[0]] = True
    set_mapping(folder, t2d=t2d)
    refused(folder, "t2d has 41 tokens that the head drafts, and not the 40 of d2t: download the folder again")


def test_mapping_of_another_vocabulary(folder):
    set_mapping(folder, t2d=np.zeros(VOCABULARY + 1, bool))
    refused(folder, "t2d has shape [97]; the config asks for [96]")


def test_mapping_without_t2d(folder):
    change_tensors(folder, lambda tensors: tensors.pop("t2d"))
    assert len(open_draft_head(folder, target_spec()).targets) == DRAFTED


def test_all_tokens_with_a_mapping_that_nobody_filled(tmp_path):
    folder = published(ModelOptEagle3).save(tmp_path)
    set_mapping(folder, d2t=np.zeros(VOCABULARY, np.int64), t2d=np.zeros(VOCABULARY, bool))
    assert open_draft_head(folder, target_spec()).targets.tolist() == list(range(VOCABULARY))


# Tensors.


def test_tensor_is_missing(folder):
    change_tensors(folder, lambda tensors: tensors.pop("midlayer.hidden_norm.weight"))
    refused(folder, "the tensor 'layers.0.hidden_norm.weight' is missing from the safetensors weights")


def test_reduced_head_is_missing(folder):
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "the tensor 'lm_head.weight' is missing from the safetensors weights")


@pytest.mark.parametrize("name", ["midlayer.self_attn.rotation.weight", "layers.1.mlp.up_proj.weight", "mask_hidden"])
def test_tensor_is_unexpected(folder, name):
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros(2, np.float32)}))
    refused(folder, f"unexpected tensor {name!r}: the config has no such weight, and without it this would be another")


def test_bias_against_the_config(tmp_path):
    folder = published(SafeAilabEagle).save(tmp_path)
    change_config(folder, bias=False)
    refused(folder, "unexpected tensor 'fc.bias'")
    change_config(folder, bias=True)
    change_tensors(folder, lambda tensors: tensors.pop("fc.bias"))
    refused(folder, "the tensor 'fc.bias' is missing")


def test_shape_is_wrong(folder):
    change_config(folder, intermediate_size=81)
    refused(folder, "gate_proj.weight has shape [80, 48]; the config asks for [81, 48]")


def test_features_of_another_number(folder):
    change_config(folder, eagle_aux_hidden_state_layer_ids=[1, 2, 3, 4])
    refused(folder, "fc.weight has shape [48, 144]; the config asks for [48, 192]")


def test_weights_are_integers(folder):
    change_tensors(folder, lambda tensors: tensors.update({"fc.weight": tensors["fc.weight"].astype(np.int8)}))
    refused(folder, "fc.weight is stored as I8; float weights were expected")


def test_one_tensor_under_two_names(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["norm.weight"]}))
    refused(folder, "are the same tensor: delete the file that is not part of the head, or download the folder again")


# Files.


def test_no_config(tmp_path):
    refused(tmp_path, f"{tmp_path / 'config.json'} is missing; the folder of a draft head was expected")


def test_pickles_are_never_opened(folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    torch.save(Hostile(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(
        folder,
        f"{folder} has no safetensors weights: pytorch_model.bin is a pickle, which is never opened; convert it, if "
        "you trust it: python -c ",
        "weights_only=True",
    )
    assert not (tmp_path / "opened").exists()


def test_the_way_to_convert_works(folder):
    import shlex
    import subprocess
    import sys

    expected = load_file(folder / "model.safetensors")
    torch.save({name: torch.from_numpy(value) for name, value in expected.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code = shlex.split(refused(folder, "python -c ").partition("python -c ")[2])[0]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert open_draft_head(folder, target_spec()).targets.shape == (DRAFTED,)
    assert load_file(folder / "model.safetensors").keys() == expected.keys()


def test_file_is_cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, f"{path} is not a whole safetensors file")


def split(folder):
    """Two shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards(folder):
    split(folder)
    head = open_draft_head(folder, target_spec())
    assert len(head.files) == 3
    for name in head.spec.tensors():
        assert head.read(name).shape == head.spec.tensors()[name]


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "a\0b", "", 7, []]
)
def test_index_leads_nowhere_else(folder, tmp_path, file):
    weight_map = split(folder)
    save_file({"x": np.zeros(1)}, tmp_path / "outside.safetensors")
    weight_map["norm.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, f"names the shard {str(file)!r}, which is not in {folder}")


def test_index_of_another_download(folder):
    weight_map = split(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, "other.weight": "model-00001-of-00002.safetensors"}}))
    refused(folder, "model-00001-of-00002.safetensors holds 'other.weight', and it does not: download the folder again")
    index.write_text("[]")
    refused(folder, f"{index} holds a list; a JSON object was expected")


def test_shard_is_missing(folder):
    split(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing: download all 2 shards")


def test_messages_have_no_place_for_code(folder):
    """`auto_map` names code: it is never looked at."""
    change_config(folder, auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit(1)")
    assert open_draft_head(folder, target_spec()).spec.kind == "eagle3"


def test_specs_that_contradict_themselves(folder):
    spec = open_draft_head(folder, target_spec()).spec
    target = target_spec()
    spec.check(target)
    for values, piece in (
        ({"own_head": False}, "drafts 40 tokens and has no LM head of its own; the model's is of 96"),
        ({"kind": "eagle", "norm_output": True}, "norms of EAGLE-3 (fc_norm, norm_output, …) in an EAGLE head"),
        ({"kind": "eagle"}, "one has 144 values, the other 48"),
        ({"decoder": replace(spec.decoder, layers=spec.decoder.layers * 2)}, "a draft head of 2 layers; one was"),
        ({"feature_layers": ()}, "reads what enters the layers []; the model has 10"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(piece)):
            replace(spec, **values).check(target)
