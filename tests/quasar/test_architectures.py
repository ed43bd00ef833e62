"""What a family says of itself, what a spec may say layer by layer, and that nobody else knows a family by name."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from quasar.checkpoints import Rope
from quasar.checkpoints.architectures.base import fused_rows, stored_shapes
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.config import spec_from_config
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import split_name
from quasar.errors import CheckpointError
from tests.tiny import tiny_config, tiny_config_json

ROOT = Path(__file__).parents[2]
PACKAGES = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
FAMILIES = ROOT / "quasar" / "checkpoints" / "architectures"
# Its "llama" and "qwen2" are kinds of tokenizer.
TOKENIZERS = ROOT / "quasar" / "checkpoints" / "gguf_tokenizer.py"


def spec_of(family):
    return spec_from_config(tiny_config_json(family), {})


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
    consumers = [group.consumer for group in architecture.smoothing]
    assert len(set(consumers)) == len(consumers)
    unsmoothed = {split_name(linear.name)[1] for linear in spec.linears()} - set(consumers)
    # What reads the residual stream itself has no producer.
    assert unsmoothed == (set() if spec.layers[0].input_norms else {"self_attn.qkv_proj", "mlp.gate_up_proj"})
    modules = {split_name(name.rpartition(".")[0])[1] for name in spec.tensors()}
    assert {group.producer for group in architecture.smoothing} <= modules
    for name in spec.tensors():
        if fused_rows(name, architecture.fused) is None:
            assert architecture.canonical_name(architecture.checkpoint_name(name)) == name
    stored_names = [architecture.checkpoint_name, *([architecture.gguf.tensor_name] if architecture.gguf else [])]
    for stored_name in stored_names:
        rows = {}
        for name, (first, *_) in spec.tensors().items():
            rows[stored_name(name)] = rows.get(stored_name(name), 0) + first
        assert rows == {name: shape[0] for name, shape in stored_shapes(spec, stored_name).items()}


@pytest.mark.parametrize("family", [name for name, one in ARCHITECTURES.items() if one.fused])
def test_fused_rows_are_every_row_once(family):
    architecture, layer = ARCHITECTURES[family], spec_of(family).layers[0]
    for stored in {one.stored for one in architecture.fused.values()}:
        parts = [one.rows(layer) for one in architecture.fused.values() if one.stored == stored]
        rows = np.concatenate(parts)
        np.testing.assert_array_equal(np.sort(rows), np.arange(len(rows)))


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
        ({"attention": {"window": 0}}, "sliding-window attention without a window"),
        ({"attention": {"softmax_scale": 0.0}}, r"softmax_scale is 0\.0"),
        ({"attention": {"softcap": -1.0}}, r"a soft cap of -1\.0 on attention scores"),
        ({"residual_scale": -0.5}, r"residual_scale is -0\.5"),
        ({"attention": {"num_heads": 2}}, "layers that differ in their heads"),
        ({"attention": {"head_size": 32}}, "layers that differ in their heads"),
        ({"attention": {"rope": Rope(theta=1e4, rotary_size=7)}}, "7 of 16 values of a head rotate"),
        ({"attention": {"rope": Rope(theta=1e4, rotary_size=32)}}, "32 of 16 values of a head rotate"),
        ({"attention": {"rope": Rope(theta=1e4, long_divisors=(1.0,))}}, "the rope scaling does not fit"),
    ],
)
def test_what_no_graph_can_express_is_refused_in_any_layer(change, message):
    with pytest.raises(CheckpointError, match=message):
        with_layer(spec_of("qwen3"), 2, **change).check()


def test_a_model_without_layers():
    with pytest.raises(CheckpointError, match="the model has no layers"):
        dataclasses.replace(spec_of("llama"), layers=()).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_softcap": -1.0}, r"a soft cap of -1\.0 on logits"),
        ({"logits_scale": 0.0}, r"logits_scale is 0\.0"),
        ({"embedding_scale": float("inf")}, "embedding_scale is inf"),
    ],
)
def test_factors_of_the_whole_model(change, message):
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(spec_of("llama"), **change).check()


def test_layers_may_have_ropes_and_windows_of_their_own():
    first, second = Rope(theta=1e4), Rope(theta=1e6, rotary_size=16)
    spec = spec_of("llama")
    for layer, (rope, window) in enumerate([(second, 64), (None, None), (first, 64)]):
        spec = with_layer(spec, layer, attention={"rope": rope, "window": window})
    spec.check()
    assert (spec.ropes, spec.windows) == ((second, first), (64,))


def test_a_rope_with_two_sets_of_divisors_is_fixed_by_the_length():
    divisors = {"divisors": (1.0,) * 8, "long_divisors": (2.0,) * 8, "original_context_length": 64}
    spec = with_layer(spec_of("llama"), 0, attention={"rope": Rope(theta=1e4, kind="divided", **divisors)})
    spec.check()
    for length, divisor in ((64, 1.0), (65, 2.0)):
        fixed = spec.at_length(length)
        assert (fixed.ropes[0].divisors, fixed.ropes[0].long_divisors) == ((divisor,) * 8, ())
        assert fixed.layers[1:] == spec.layers[1:]
    assert fixed.at_length(64) is fixed


def test_a_window_is_that_of_its_layers():
    """What is refused is what the config says, layer by layer."""
    config = {**tiny_config("qwen2").to_dict(), "use_sliding_window": True, "sliding_window": 64}
    config |= {"layer_types": None, "max_window_layers": 2, "architectures": ["Qwen2ForCausalLM"]}
    layers = ARCHITECTURES["qwen2"].from_config(HuggingFaceConfig(config, {})).layers
    assert [layer.attention.window for layer in layers] == [None, None, 64]
