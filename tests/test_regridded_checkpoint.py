"""The script of re-gridded checkpoints: the same function, and no weight where it was."""

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.float_model import load_float_model
from quasar.checkpoints import open_checkpoint
from tests.commands import command
from tests.tiny import save_tiny_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "regridded_checkpoint.py"


def write(model, folder):
    return command(SCRIPT, model, "-o", folder)


def logits(folder):
    model = load_float_model(open_checkpoint(str(folder)))
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 60)[None], use_cache=False).logits[0].double().numpy()


# Plain; with biases of q, k and v; with norms of queries and keys; with a multiplier of the residual stream.
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "granite"])
def test_the_function_stays_and_the_weights_move(architecture, tmp_path):
    model, folder = save_tiny_model(tmp_path / "model", architecture), tmp_path / "regridded"
    done = write(model, folder)
    assert done.returncode == 0, done.stderr
    expected, found = logits(model), logits(folder)
    # Sums in float32 of other numbers, 5e-5 apart at most where Granite's multipliers enlarge them; logits are around
    # one, and a channel that is not divided again moves them by tenths.
    np.testing.assert_allclose(found, expected, atol=1e-4)
    before, after = open_checkpoint(str(model)), open_checkpoint(str(folder))
    for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"layers.1.self_attn.{linear}.weight"
        ratio = after.read(name).astype(np.float32) / before.read(name).astype(np.float32)
        assert ratio.std() > 0.1
    for linear in ("gate_proj", "up_proj", "down_proj"):
        name = f"layers.1.mlp.{linear}.weight"
        assert (after.read(name) / before.read(name)).std() > 0.1


def test_what_it_cannot_turn_is_one_line(tmp_path):
    model = save_tiny_model(tmp_path / "model", "gemma2")
    for folder, message in ((tmp_path / "new", "norms after attention and MLP"), (model, "exists: name a folder")):
        done = write(model, folder)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
