"""Which layers are left out, and what those that stay are called."""

import pytest

from quasar.checkpoints.skipped_layers import own_name, parse_layers, remaining_layers, renumbered
from quasar.errors import CheckpointError


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


def test_names_of_the_layers_that_stay():
    remaining = remaining_layers("1-2", 4)
    assert remaining == (0, 3)
    assert remaining_layers("", 2) == (0, 1)
    assert own_name("layers.1.mlp.down_proj", remaining) == "layers.3.mlp.down_proj"
    assert own_name("embed_tokens.weight", remaining) == "embed_tokens.weight"
    whole = {"lm_head": 0, **{f"layers.{layer}.self_attn.o_proj": layer for layer in range(4)}}
    assert renumbered(whole, remaining) == {
        "lm_head": 0,
        "layers.0.self_attn.o_proj": 0,
        "layers.1.self_attn.o_proj": 3,
    }
