"""Windows, soft caps and wide heads on stock kernels: bits that do not depend on the width, and trees."""

import numpy as np
import pytest

from quasar.checkpoints import open_checkpoint
from tests.graphs import export_graphs, host_session, lowered_session, run_in_chunks
from tests.tiny import VOCABULARY, save_tiny_model

# 0 ── 1 ── 3        rows 0, 2, 4, 5 form one path, 0, 1, 3 the other
#  └── 2 ── 4 ── 5
PARENTS = np.array([-1, 0, 0, 1, 2, 4])
SOFT_CAPPED = ("gemma2", {"num_hidden_layers": 2, "sliding_window": 16, "head_dim": 256, "attn_logit_softcapping": 3.0})
WINDOWED = {
    "gemma3": ("gemma3_text", {"num_hidden_layers": 2, "sliding_window": 5, "sliding_window_pattern": 2}),
    "gemma2": (
        "gemma2",
        {"num_hidden_layers": 2, "sliding_window": 4, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24},
    ),
    "mistral": ("mistral", {"num_hidden_layers": 2, "sliding_window": 3}),
}


def test_a_position_has_the_same_bits_at_every_width(tmp_path):
    """Across the window, and across 64 positions, where ONNX Runtime's attention of wide heads changes its path."""
    architecture, options = SOFT_CAPPED
    contract = export_graphs(open_checkpoint(str(save_tiny_model(tmp_path / "m", architecture, **options))), tmp_path)
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, 80)
    session = lowered_session(tmp_path, contract)
    plain = run_in_chunks(session, tokens, 1)
    for width in range(2, 9):
        np.testing.assert_array_equal(run_in_chunks(session, tokens, width), plain)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_counts_positions_on_the_path(name, backend, tmp_path):
    """Not slots: siblings stand between a position and its ancestors."""
    architecture, options = WINDOWED[name]
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "m", architecture, **options)))
    contract = export_graphs(checkpoint, tmp_path, tree_mask=True)
    session = {"onnxruntime": lowered_session, "tensorrt": host_session}[backend](tmp_path, contract)
    random = np.random.default_rng(6)
    prompt, fed = random.integers(0, VOCABULARY, 40), random.integers(0, VOCABULARY, len(PARENTS))
    for cached in (2, 40):
        session.run(prompt[:cached], 0, 1)
        logits = session.run_logits(fed, cached, len(fed), PARENTS)
        for path in ([0, 2, 4, 5], [0, 1, 3]):
            session.run(prompt[:cached], 0, 1)
            # float32 sums of up to 46 terms in another order, through two layers.
            expected = session.run_logits(fed[path], cached, len(path))
            np.testing.assert_allclose(logits[path], expected, atol=1e-4, rtol=0)
