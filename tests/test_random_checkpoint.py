"""The script of random checkpoints: a folder that builds and transformers take, the same for the same seed."""

from pathlib import Path

import numpy as np
import pytest

from quasar.checkpoints import open_checkpoint
from tests.commands import command
from tests.tiny import save_tiny_model
from tests.tiny_gguf import save_tiny_gguf

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "random_checkpoint.py"


def write(folder, *options):
    return command(SCRIPT, folder, *options)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_gguf(tmp_path_factory.mktemp("tokenizer") / "m.gguf", tokenizer__chat_template="{{ messages }}")


def test_a_folder_is_a_checkpoint(tokenizer, tmp_path):
    options = ("--tokenizer", tokenizer, "--shape", "smollm2", "--layers", 2, "--shard-gb", 0.06)
    done = write(tmp_path / "model", *options)
    assert done.returncode == 0, done.stderr
    assert "smollm2, 2 layers" in done.stdout
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert not checkpoint.spec.tied_head
    # Embedding and head are larger than a shard.
    assert len([path for path in checkpoint.files if path.suffix == ".safetensors"]) == 3
    text, own = checkpoint.text(), open_checkpoint(str(tokenizer)).text()
    assert text.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    assert (text.chat_templates, set(text.end_ids)) == (own.chat_templates, set(own.end_ids))
    deviations = {"q_proj": 0.02, "o_proj": 0.01, "v_proj": 0.02}
    for name, expected in deviations.items():
        values = checkpoint.read(f"layers.1.self_attn.{name}.weight").astype(np.float32)
        assert values.std() == pytest.approx(expected, rel=0.02)
    assert (checkpoint.read("norm.weight") == 1).all()
    assert checkpoint.transformers_config().num_hidden_layers == 2


def test_the_same_seed_makes_the_same_weights(tokenizer, tmp_path):
    options = ("--tokenizer", tokenizer, "--shape", "smollm2", "--layers", 1, "--tied-head")
    for name, seed in (("model", 0), ("again", 0), ("other", 1)):
        done = write(tmp_path / name, *options, "--seed", seed)
        assert done.returncode == 0, done.stderr
    first, again, other = (
        open_checkpoint(str(tmp_path / name)).read("layers.0.mlp.up_proj.weight")
        for name in ("model", "again", "other")
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9


def test_what_does_not_fit_is_one_line(tokenizer, tmp_path):
    folder = save_tiny_model(tmp_path / "tokenizer", "llama")
    for options, message in (
        (
            ("--tokenizer", folder, "--shape", "tiny-qwen3"),
            "the tokenizer has the token 259, and the shape's embedding",
        ),
        (("--tokenizer", tokenizer, "--layers", 40), "--layers is 40; 1 to 36 were expected"),
    ):
        done = write(tmp_path / "model", *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
        assert not (tmp_path / "model").exists()
