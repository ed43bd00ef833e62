"""The canonical graph's tokens: `next_tokens` and `top_tokens` follow from its logits, whatever it is lowered to."""

import numpy as np
import pytest

from quasar.checkpoints import open_checkpoint
from tests.graphs import export_graphs, host_session, likeliest, lowered_session, native_session, run_canonical
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model, tiny_torch_model

TIED = [7, 50, 160, 319]


def model_with_ties(folder):
    """A model whose head leaves all tokens but `TIED` at exactly 0."""
    import torch

    model = tiny_torch_model("llama")
    with torch.no_grad():
        kept = model.lm_head.weight[TIED].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[TIED] = kept
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["w8a8", "fp32", "ties", "six words"])
def graphs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    if request.param == "ties":
        model = model_with_ties(folder / "model")
    else:
        model = save_tiny_model(folder / "model", "llama", vocab_size=6 if request.param == "six words" else 320)
    checkpoint = open_checkpoint(str(model))
    precision = "w8a8" if request.param == "w8a8" else "fp32"
    return folder, export_graphs(checkpoint, folder, precision=precision), checkpoint.spec


def test_tokens_are_the_likeliest(graphs):
    folder, contract, spec = graphs
    assert contract.top_k == min(8, spec.vocab_size)
    logits = run_canonical(folder, contract, np.random.default_rng(0).integers(0, spec.vocab_size, 40))
    assert logits.shape == (40, spec.vocab_size)


def test_most_tokens_tie_where_they_should(tmp_path):
    contract = export_graphs(open_checkpoint(str(model_with_ties(tmp_path / "model"))), tmp_path)
    logits = run_canonical(tmp_path, contract, np.arange(40))
    assert ((logits == 0).sum(axis=-1) == 320 - len(TIED)).all()
    # At some positions the likeliest one is among those that tie.
    assert (logits.max(axis=-1) == 0).any()


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("native", marks=needs_library), "tensorrt"])
def test_every_lowering_gives_the_likeliest_tokens(graphs, backend):
    folder, contract, spec = graphs
    open_session = {
        "onnxruntime": lambda: lowered_session(folder, contract),
        "native": lambda: native_session(folder, contract, spec),
        "tensorrt": lambda: host_session(folder, contract),
    }
    session = open_session[backend]()
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, 20)
    assert session.top_tokens.shape == (0, contract.top_k)
    for count in (20, 1, 7):
        logits = session.run_logits(tokens, 0, count)
        expected = likeliest(logits, contract.top_k)
        assert session.top_tokens.dtype == np.int64
        np.testing.assert_array_equal(session.top_tokens, expected)
        next_tokens = session.run(tokens, 0, count)
        np.testing.assert_array_equal(next_tokens, logits.argmax(axis=-1))
        np.testing.assert_array_equal(session.top_tokens, expected)
