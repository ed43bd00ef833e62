"""Hidden states that a session tells: those of transformers' model, and the same tokens as without."""

import numpy as np
import pytest

from engines.onnxruntime.session import OnnxRuntimeSession
from engines.session import Positions
from plugins.cpu import toolchain
from quasar.checkpoints import open_checkpoint
from quasar.errors import EngineError
from tests.graphs import export_graphs, native_session
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

TOKENS = np.array([5, 9, 2, 7, 11, 3, 8], np.int64)
KERNELS = [pytest.param("native", marks=needs_library), "stock"]


@pytest.fixture(scope="module", params=["fp32", "w8a8"])
def graphs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(folder / "model", "llama")
    checkpoint = open_checkpoint(str(model))
    contract = export_graphs(checkpoint, folder, precision=request.param)
    native_session(folder, contract, checkpoint.spec)
    return folder, model, contract


def open_session(graphs, kernels, layers, slots=1):
    folder, _, contract = graphs
    native = kernels == "native"
    return OnnxRuntimeSession(
        folder,
        folder / ("native.onnx" if native else "lowered.onnx"),
        contract,
        threads=1,
        exact_integers=True,
        library=toolchain.LIBRARY if native else None,
        slots=slots,
        hidden_states=layers,
    )


def float_hidden_states(model):
    """What enters each layer, and what leaves the last one before the final norm: float32 [T, hidden]."""
    import torch
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in found.model.layers]
    hooks.append(found.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
    with torch.no_grad():
        found(torch.from_numpy(TOKENS)[None])
    for hook in hooks:
        hook.remove()
    return [states[0].numpy() for states in seen]


@pytest.mark.parametrize("kernels", KERNELS)
def test_they_are_those_of_the_float_model(graphs, kernels):
    _, model, contract = graphs
    layers = (1, contract.num_layers)
    session = open_session(graphs, kernels, layers)
    assert session.hidden_states is None
    plain = open_session(graphs, kernels, ())
    expected = float_hidden_states(model)
    for part in (slice(0, 4), slice(4, 7)):
        tokens = session.run(TOKENS[part], part.start, 2).copy()
        np.testing.assert_array_equal(tokens, plain.run(TOKENS[part], part.start, 2))
        for layer, states in zip(layers, session.hidden_states, strict=True):
            reference = expected[layer][part]
            # W8A8 rounds weights and activations to 8 bits: a hundredth of what a layer adds, and a bit more.
            close = 1e-4 if "fp32" in str(graphs[0]) else 0.05
            assert states.shape == reference.shape
            assert np.abs(states - reference).max() < close * np.abs(reference).max()
    assert plain.hidden_states is None
    assert session.memory().buffers > plain.memory().buffers


@pytest.mark.parametrize("kernels", KERNELS)
def test_those_of_a_batch_come_sequence_after_sequence(graphs, kernels):
    session = open_session(graphs, kernels, (1,), slots=2)
    alone = []
    for tokens in (TOKENS[:3], TOKENS[3:]):
        session.run(tokens, 0, 1)
        alone.append(session.hidden_states[0].copy())
    batch = [
        Positions(tokens=tokens, cache_length=0, num_logits=1, slot=slot)
        for slot, tokens in enumerate((TOKENS[:3], TOKENS[3:]))
    ]
    session.run_batch(batch)
    np.testing.assert_array_equal(session.hidden_states[0], np.concatenate(alone))


def test_what_enters_the_first_layer_is_no_hidden_state(graphs):
    with pytest.raises(EngineError, match="enter layer 0 were asked for; layers from 1 on"):
        open_session(graphs, "stock", (0,))


def test_a_layer_that_the_graph_lacks_is_named(graphs):
    with pytest.raises(EngineError, match=r"layers\.6\.output"):
        open_session(graphs, "stock", (7,))
