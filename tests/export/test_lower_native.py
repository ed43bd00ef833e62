"""Graphs of native operators: the logits of the stock lowering, and chunks and trees with the bits of a chain."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import PreconditionError

from engines.cache_rows import to_float32
from engines.contract import CACHE_SLOTS, SEQUENCE_STARTS, TREE_MASK
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.onnxruntime.session_options import session_options
from engines.probes.tree_invariance import trees_are_exact
from export.builder import GraphBuilder
from export.passes import CachesToInt8, KeepLayers, LowerToNative, LowerToOnnxRuntime, StoredWeights
from export.weight_file import WeightFile
from plugins.cpu import toolchain
from plugins.w8a8_linear import GELU, NO_GATE, SILU
from quasar.checkpoints import open_checkpoint
from tests.graphs import export_graphs, lowered_session, native_session, run_in_chunks
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

MODELS = {
    "llama": ("llama", {}),
    # Biases on q, k and v.
    "qwen2": ("qwen2", {}),
    # Norms of queries and keys; one kv head for all.
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
    # A window over some layers, soft caps, norms around, gates of gelu, a factor on embeddings, and a scale.
    "gemma2": ("gemma2", {"sliding_window": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}),
    # Two ropes; windows in all layers but one.
    "gemma3": ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 3}),
    # Norms after, and over whole rows of queries and keys.
    "olmo2": ("olmo2", {"num_key_value_heads": 1}),
    # Every other layer does not rotate.
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "granite": ("granite", {"attention_multiplier": 0.4, "residual_multiplier": 0.6, "logits_scaling": 0.5}),
    "mistral": ("mistral", {"sliding_window": 40}),
    # Half of a head is rotated.
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "hidden_size": 128, "sliding_window": 16}),
    "odd sizes": ("llama", {"hidden_size": 60, "intermediate_size": 90, "head_dim": 48, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=[(name, precision) for name in MODELS for precision in ("fp32", "w8a8")])
def graphs(request, tmp_path_factory):
    name, precision = request.param
    folder = tmp_path_factory.mktemp("graphs")
    architecture, overrides = MODELS[name]
    checkpoint = open_checkpoint(str(save_tiny_model(folder / "model", architecture, **overrides)))
    return folder, export_graphs(checkpoint, folder, precision=precision), checkpoint.spec, precision


def operators(model):
    return [node.op_type for node in model.graph]


def lowered(folder, spec, *passes):
    model = ir.load(folder / "canonical.onnx")
    for one in passes:
        one(model)
    with WeightFile(folder / "packed.data", folder) as weights:
        LowerToNative(spec, StoredWeights(weights))(model)
    return model


def test_each_linear_is_one_node_with_its_neighbours(graphs):
    folder, _, spec, precision = graphs
    kinds = operators(model := lowered(folder, spec))
    assert kinds.count("VerifyAttention") == spec.num_layers
    after = sum(2 * layer.output_norms for layer in spec.layers)
    if precision == "w8a8":
        # Norms, biases, residuals and gates are in the linears; the embedding and the head's rows are gathered. A norm
        # after a linear keeps the residual sum from it.
        # Rows of the embedding, which is stored in 16 bits, become floats.
        embedded = ["Cast", "Mul"] if spec.embedding_scale != 1 else ["Cast"]
        capped = ["Div", "Tanh", "Mul"] if spec.logits_softcap else []
        others = sorted(kind for kind in kinds if kind not in ("W8A8Linear", "VerifyAttention", "TopK", "Gather"))
        assert others == sorted(["RMSNormalization", "Add"] * after + embedded + capped)
        linears = [node for node in model.graph if node.op_type == "W8A8Linear"]
        assert len(linears) == len(list(spec.linears()))
        gates = [node.attributes["gate"].as_int() for node in linears]
        gate = GELU if spec.layers[0].mlp.kind == "gated_gelu_tanh" else SILU
        assert gates == [NO_GATE, NO_GATE, gate, NO_GATE] * spec.num_layers + [NO_GATE]
    else:
        before = sum(2 * layer.input_norms for layer in spec.layers)
        assert kinds.count("RMSNormalization") == before + after + 1
        assert kinds.count("MatMul") == len(list(spec.linears()))
    for node, layer in zip((n for n in model.graph if n.op_type == "VerifyAttention"), spec.layers, strict=True):
        of = layer.attention
        tables = [str(node.inputs[index].name) for index in (5, 6)]
        if of.rope is None:
            assert tables == ["rotary.none"] * 2
            assert node.inputs[5].const_value.shape[1] == 0
        else:
            number = spec.ropes.index(of.rope)
            assert tables == ["rotary.cos" + f".{number}" * (number > 0), "rotary.sin" + f".{number}" * (number > 0)]
        assert node.attributes["local_window_size"].as_int() == (of.window or 0)
        assert node.attributes["scale"].as_float() == np.float32(of.scale)
        assert node.attributes["softcap"].as_float() == of.softcap
        sizes = {None: [], "head": [of.head_size] * 2, "row": [of.query_size, of.kv_size]}[of.qk_norm]
        assert [value.shape[0] for value in node.inputs[8:10] if value is not None] == sizes
        assert [str(value.name) for value in node.inputs[10:]] == [SEQUENCE_STARTS, CACHE_SLOTS]
    assert {TREE_MASK, SEQUENCE_STARTS, CACHE_SLOTS} < {value.name for value in model.graph.inputs}


def test_a_graph_that_is_not_canonical_is_refused(graphs):
    folder, _, spec, _ = graphs
    model = ir.load(folder / "canonical.onnx")
    LowerToOnnxRuntime(spec)(model)
    with WeightFile(folder / "none.data") as weights, pytest.raises(PreconditionError, match="no canonical verifier"):
        LowerToNative(spec, StoredWeights(weights))(model)


@needs_library
def test_logits_are_those_of_the_stock_lowering(graphs):
    folder, contract, spec, precision = graphs
    tokens = np.random.default_rng(1).integers(0, 320, 300)
    native, stock = native_session(folder, contract, spec), lowered_session(folder, contract)
    ours, theirs = run_in_chunks(native, tokens, 100), run_in_chunks(stock, tokens, 100)
    if precision == "fp32":
        # Attention sums in another order.
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    else:
        # A last bit before a rounding to 8 bit becomes a step of 1/127 after it: close, and no systematic difference.
        spread = theirs.std()
        assert np.abs(ours - theirs).mean() < 0.05 * spread
        assert abs((ours - theirs).mean()) < 0.005 * spread
    np.testing.assert_allclose(
        native.read_rows(0, 300, [0]), stock.read_rows(0, 300, [0]), atol=2e-5, rtol=0, err_msg="first layer"
    ) if precision == "fp32" else None
    np.testing.assert_array_equal(native.run(tokens[:5], 0, 5), native.run_logits(tokens[:5], 0, 5).argmax(axis=-1))


@needs_library
def test_widths_chunks_and_trees_give_the_bits_of_a_chain(graphs):
    folder, contract, spec, _ = graphs
    session = native_session(folder, contract, spec)
    tokens = np.random.default_rng(2).integers(0, 320, 140)
    one_by_one = run_in_chunks(session, tokens, 1)
    for size in (2, 3, 7, 8, 31, 64, 100, 140):
        np.testing.assert_array_equal(run_in_chunks(session, tokens, size), one_by_one, err_msg=str(size))
    assert session.takes_trees
    assert trees_are_exact(session)


@needs_library
def test_the_cut_down_copy_has_the_layers_of_the_whole(graphs):
    folder, contract, spec, _ = graphs
    model = lowered(folder, spec, KeepLayers(1, spec))
    ir.save(model, folder / "native_probe.onnx")
    assert operators(model).count("VerifyAttention") == 1
    session = OnnxRuntimeSession(
        folder, folder / "native_probe.onnx", contract, num_layers=1, threads=1, library=toolchain.LIBRARY
    )
    whole = native_session(folder, contract, spec)
    tokens = np.random.default_rng(3).integers(0, 320, 20)
    session.run_logits(tokens, 0, 1)
    whole.run(tokens, 0, 1)
    np.testing.assert_array_equal(session.read_rows(0, 20), whole.read_rows(0, 20, [0]))


@needs_library
@pytest.mark.parametrize(("kv_dtype", "step"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_caches_of_16_bits_are_exact_too(graphs, kv_dtype, step):
    folder, contract, spec, precision = graphs
    session, other = native_session(folder, contract, spec, kv_dtype), native_session(folder, contract, spec)
    tokens = np.random.default_rng(4).integers(0, 320, 90)
    logits = run_in_chunks(session, tokens, 30)
    np.testing.assert_array_equal(run_in_chunks(session, tokens, 1), logits)
    assert trees_are_exact(session, (1, 64, 100))
    run_in_chunks(session, tokens, 90)
    expected = run_in_chunks(other, tokens, 90)
    # The first layer's positions are those of the float32 cache, rounded once.
    first, rounded = other.read_rows(0, 90, [0]), to_float32(session.read_rows(0, 90, [0]))
    np.testing.assert_allclose(rounded, first, rtol=step, atol=1e-6)
    assert not np.array_equal(rounded, first)
    # Roundings of keys and values spread to the logits (seen: 1.2 steps of the spread); after roundings to 8 bit they
    # become steps of 1/127 (seen: 3 % of the spread).
    limit = 3 * step if precision == "fp32" else 0.06
    assert np.abs(logits - expected).mean() < limit * expected.std()
    # What is read can be written back: the same bits.
    rows = session.read_rows(0, 90)
    session.write_rows(0, np.zeros_like(rows))
    session.write_rows(0, rows)
    np.testing.assert_array_equal(session.read_rows(0, 90), rows)
    np.testing.assert_array_equal(session.run_logits(tokens[60:], 60, 30), logits[60:])


@needs_library
def test_int8_caches_are_exact_too(graphs):
    folder, contract, spec, _ = graphs
    tokens = np.random.default_rng(4).integers(0, 320, 90)
    other = native_session(folder, contract, spec)
    expected = run_in_chunks(other, tokens, 90)
    floats = other.read_rows(0, 90)
    # Of each channel of a head; the last positions lie beyond, and are clipped.
    scales = [tuple(np.abs(part[:, :80]).max(axis=1) / 127 for part in layer) for layer in floats]
    model = ir.load(folder / "native.onnx")
    assert CachesToInt8(scales)(model).modified
    ir.save(model, folder / "native_int8.onnx")
    session = OnnxRuntimeSession(
        folder, folder / "native_int8.onnx", contract, threads=1, exact_integers=True, library=toolchain.LIBRARY
    )
    logits = run_in_chunks(session, tokens, 30)
    np.testing.assert_array_equal(run_in_chunks(session, tokens, 1), logits)
    assert trees_are_exact(session, (1, 64, 100))
    run_in_chunks(session, tokens, 90)
    rows = session.read_rows(0, 90)
    assert rows.dtype == np.int8
    for part, scale, whole in zip(rows[0], scales[0], floats[0], strict=True):
        # The first layer's positions are those of the float32 cache, rounded; rotation's last bit may tip one over.
        assert np.abs(part - (whole / scale[:, None]).round().clip(-127, 127)).max() <= 1
    # A rounding of 1/254 of a channel's range for each key and value (seen: 1 to 5 % of the logits' spread).
    assert np.abs(logits - expected).mean() < 0.1 * expected.std()
    session.write_rows(0, np.zeros_like(rows))
    session.write_rows(0, rows)
    np.testing.assert_array_equal(session.run_logits(tokens[60:], 60, 30), logits[60:])
    with pytest.raises(PreconditionError, match="no VerifyAttention"):
        CachesToInt8(scales).requires(model)


def standard(kind, columns):
    """What native graphs leave to ONNX Runtime, x float32 [1, T, columns] → y, as the canonical graph has it."""
    graph = GraphBuilder()
    x = graph.input("x", ir.DataType.FLOAT, [1, "tokens", columns])
    factor = graph.constant("factor", np.asarray(30, np.float32))
    match kind:
        case "output norm":
            weight = np.random.default_rng(0).uniform(0.5, 1.5, columns).astype(np.float32)
            given = [x, graph.constant("weight", weight)]
            y = graph.op("Add", [x, graph.op("RMSNormalization", given, "normed", {"axis": -1, "epsilon": 1e-6})], "y")
        case "gelu":
            y = graph.op("Gelu", [x], "y", {"approximate": "tanh"})
        case "silu":
            y = graph.op("Mul", [x, graph.op("Sigmoid", [x], "sigmoid")], "y")
        case _:
            y = graph.op("Mul", [graph.op("Tanh", [graph.op("Div", [x, factor], "divided")], "bounded"), factor], "y")
    graph.output(y, ir.DataType.FLOAT, [1, "tokens", columns])
    return ir.to_proto(graph.model("standard", "test")).SerializeToString()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["output norm", "gelu", "silu", "soft cap"])
@pytest.mark.parametrize("columns", [90, 2304, 18433])
def test_standard_operators_that_are_left_have_the_same_bits_at_every_width(kind, columns, threads):
    """Whole vectors, and their ends: how a tensor is cut between threads is no part of a value."""
    session = ort.InferenceSession(
        standard(kind, columns), session_options(threads=threads, exact_integers=True), ["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).standard_normal((1, 17, columns), np.float32) * 3
    [whole] = session.run(None, {"x": x})
    for start, width in ((0, 1), (1, 2), (4, 7), (16, 1)):
        [part] = session.run(None, {"x": x[:, start : start + width].copy()})
        np.testing.assert_array_equal(part, whole[:, start : start + width], err_msg=f"{start}, {width}")
