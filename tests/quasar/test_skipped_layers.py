"""A checkpoint without some of its layers against transformers' model without them."""

import numpy as np
import pytest
import torch

from calibration.float_model import load_float_model
from quasar.checkpoints import open_checkpoint, skip_layers
from quasar.checkpoints.skipped_layers import parse_layers
from quasar.errors import CheckpointError
from tests.tiny import save_tiny_model


@pytest.mark.parametrize(
    ("text", "layers"), [("", ()), ("2", (2,)), ("1-3", (1, 2, 3)), ("5, 0-1,1", (0, 1, 5)), ("0-4", (0, 1, 2, 3, 4))]
)
def test_layers_by_number_and_range(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "layers to skip are 'x'; numbers and ranges were expected, as in 3,10-19"),
        ("1,", "numbers and ranges were expected"),
        ("6", "layers to skip are 6; the model has layers 0 to 5"),
        ("4-2", "the model has layers 0 to 5"),
        ("0-5", "all layers were to be skipped; at least one must stay"),
    ],
)
def test_what_cannot_be_skipped(text, message):
    with pytest.raises(CheckpointError, match=message):
        parse_layers(text, 6)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_what_is_left_computes_as_the_model_without_those_layers(tmp_path, architecture):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "model", architecture, num_hidden_layers=4)))
    rest = skip_layers(checkpoint, "1-2")
    assert rest.spec.num_layers == 2
    whole = load_float_model(checkpoint)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[0], whole.model.layers[3]])
    tokens = torch.arange(20, 40)[None]
    with torch.inference_mode():
        expected = whole(tokens, use_cache=False).logits.numpy()
        np.testing.assert_array_equal(load_float_model(rest)(tokens, use_cache=False).logits.numpy(), expected)
    assert skip_layers(checkpoint, "") is checkpoint
