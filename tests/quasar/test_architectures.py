"""What a family says of itself, what a spec may say layer by layer, and that nobody else knows a family by name."""

import ast
import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.config import spec_from_config
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import split_name
from quasar.errors import CheckpointError
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]
PACKAGES = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
FAMILIES = ROOT / "quasar" / "checkpoints" / "architectures"
# Its "llama" and "qwen2" are kinds of tokenizer.
TOKENIZERS = ROOT / "quasar" / "checkpoints" / "gguf_tokenizer.py"


def spec_of(family):
    return spec_from_config({**tiny_config(family).to_dict(), "architectures": [ARCHITECTURES[family].model_class]}, {})


def with_layer(spec, number, *, attention=None, mlp=None, **change):
    layer = spec.layers[number]
    layer = dataclasses.replace(
        layer,
        attention=dataclasses.replace(layer.attention, **attention or {}),
        mlp=dataclasses.replace(layer.mlp, **mlp or {}),
        **change,
    )
    return dataclasses.replace(spec, layers=(*spec.layers[:number], layer, *spec.layers[number + 1 :]))


def test_families_are_known_by_name_in_their_own_files_alone():
    names = {one.name for one in ARCHITECTURES.values()} | {one.model_class for one in ARCHITECTURES.values()}
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            if path.parent == FAMILIES or path == TOKENIZERS:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not isinstance(node, ast.Constant) or node.value not in names, f"{path} names {node.value}"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_family_and_its_tensors(family):
    architecture, spec = ARCHITECTURES[family], spec_of(family)
    assert architecture.name == spec.architecture == family
    consumers = Counter(group.consumer for group in architecture.smoothing)
    assert consumers == Counter({split_name(linear.name)[1] for linear in spec.linears()})
    modules = {split_name(name.rpartition(".")[0])[1] for name in spec.tensors()}
    assert {group.producer for group in architecture.smoothing} <= modules
    for name in spec.tensors():
        assert architecture.canonical_name(architecture.checkpoint_name(name)) == name
    stored = [architecture.gguf.tensor_name(name) for name in spec.tensors()]
    assert len(set(stored)) == len(stored)


def test_layers_have_tensors_of_their_own():
    spec = with_layer(spec_of("llama"), 1, attention={"output_bias": True}, mlp={"intermediate_size": 160})
    spec.check()
    shapes = spec.tensors()
    assert [name for name in shapes if name.endswith(".bias")] == ["layers.1.self_attn.o_proj.bias"]
    assert [shapes[f"layers.{layer}.mlp.down_proj.weight"] for layer in range(3)] == [(64, 96), (64, 160), (64, 96)]
    kept = spec.keep_layers((1, 2))
    assert kept.layers == spec.layers[1:]
    assert kept.tensors()["layers.0.mlp.down_proj.weight"] == (64, 160)
    assert spec.linear_of("layers.1.mlp.up_proj").outputs == 320
    assert spec.linear_of("layers.1.input_layernorm") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {"window": 64}}, "sliding-window attention"),
        ({"attention": {"softmax_scale": 0.5}}, r"a softmax scale of its own \(0\.5\)"),
        ({"attention": {"softcap": 50.0}}, r"a soft cap on attention scores \(50\.0\)"),
        ({"norms": "after"}, "norms after attention and MLP"),
        ({"norms": "around"}, "norms around attention and MLP"),
        ({"attention": {"num_heads": 2}}, "layers that differ in their heads or in their rope"),
    ],
)
def test_what_no_graph_can_express_is_refused_in_any_layer(change, message):
    with pytest.raises(CheckpointError, match=message):
        with_layer(spec_of("qwen3"), 2, **change).check()


def test_a_model_without_layers():
    with pytest.raises(CheckpointError, match="the model has no layers"):
        dataclasses.replace(spec_of("llama"), layers=()).check()


def test_a_window_is_that_of_its_layers():
    """What is refused is what the config says, layer by layer."""
    config = {**tiny_config("qwen2").to_dict(), "use_sliding_window": True, "sliding_window": 64}
    config |= {"layer_types": None, "max_window_layers": 2, "architectures": ["Qwen2ForCausalLM"]}
    layers = ARCHITECTURES["qwen2"].from_config(HuggingFaceConfig(config, {})).layers
    assert [layer.attention.window for layer in layers] == [None, None, 64]
