"""Batches: the bits, tokens and cache positions of every sequence are those that it has alone, in slot 0."""

import re
from pathlib import Path

import numpy as np
import pytest

from engines.batches import only_sequence
from engines.contract import SEQUENCE_STARTS
from engines.loading import load_engine
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.session import Positions
from plugins.cpu import toolchain
from quasar.checkpoints import open_checkpoint
from quasar.errors import EngineError, GenerationError
from runtime.testing import TableSession
from tests.engines.batches import check_batches
from tests.graphs import export_graphs, lowered_session, native_session
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

SLOTS = 4
MODELS = {
    "llama": ("llama", {}),
    # Norms of queries and keys.
    "qwen3": ("qwen3", {}),
    # Windows in some layers, soft caps.
    "gemma2": ("gemma2", {"sliding_window": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
}


@pytest.fixture(scope="module", params=MODELS)
def graphs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    architecture, overrides = MODELS[request.param]
    checkpoint = open_checkpoint(str(save_tiny_model(folder / "model", architecture, **overrides)))
    return folder, export_graphs(checkpoint, folder, precision="w8a8"), checkpoint.spec


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """With a tree mask in the stock graph."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = open_checkpoint(str(save_tiny_model(folder / "model", "llama")))
    return folder, export_graphs(checkpoint, folder, precision="w8a8", tree_mask=True), checkpoint.spec


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_native_kernels_run_a_batch_in_one_pass(graphs, threads):
    folder, contract, spec = graphs
    session = native_session(folder, contract, spec, threads=threads, slots=SLOTS, max_positions=4 * 90)
    assert (session.num_slots, session.max_sequences, session.max_positions) == (SLOTS, SLOTS, 360)
    check_batches(session, native_session(folder, contract, spec), threads)


@needs_library
@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
def test_caches_of_16_bits_have_slots_too(llama, kv_dtype):
    folder, contract, spec = llama
    session = native_session(folder, contract, spec, kv_dtype, slots=SLOTS, max_positions=400)
    check_batches(session, native_session(folder, contract, spec, kv_dtype), 3, rounds=6)


def test_stock_kernels_run_a_pass_for_each_sequence(llama):
    folder, contract, _ = llama
    session = lowered_session(folder, contract, slots=SLOTS)
    assert (session.num_slots, session.max_sequences, session.max_positions) == (SLOTS, 1, 256)
    # More positions than one pass has are refused, though each sequence gets a pass of its own.
    session.max_positions = 400
    check_batches(session, lowered_session(folder, contract), 4)


@needs_library
def test_a_native_graph_of_an_earlier_version_runs_a_pass_for_each_sequence(llama):
    folder, contract, spec = llama
    earlier = native_session(folder, contract, spec, slots=SLOTS, ragged=False)
    assert (earlier.num_slots, earlier.max_sequences) == (SLOTS, 1)
    assert earlier.takes_trees
    earlier.max_positions = 400
    check_batches(earlier, native_session(folder, contract, spec), 5, rounds=8)


@needs_library
def test_slots_order_and_neighbours_do_not_matter(llama):
    folder, contract, spec = llama
    session = native_session(folder, contract, spec, slots=SLOTS)
    random = np.random.default_rng(6)
    rows = [session.read_rows(0, 60)] * SLOTS
    for slot in range(SLOTS):
        session.run_batch([Positions(tokens=random.integers(0, 320, 60), cache_length=0, num_logits=0, slot=slot)])
        rows[slot] = session.read_rows(0, 60, slot=slot)
    fed = [random.integers(0, 320, width) for width in (1, 9, 33, 2)]
    outcomes = []
    for slots in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        for number, slot in enumerate(slots):
            session.write_rows(0, rows[number], slot=slot)
        order = random.permutation(SLOTS).tolist()
        batch = [Positions(tokens=fed[number], cache_length=60, num_logits=1, slot=slots[number]) for number in order]
        logits = np.empty((SLOTS, 320), np.float32)
        session.run_batch(batch, logits=logits)
        outcomes.append(logits[np.argsort(order)].tobytes())
    assert len(set(outcomes)) == 1


@needs_library
def test_a_batch_may_want_nothing(llama):
    folder, contract, spec = llama
    for session in (
        native_session(folder, contract, spec, slots=2),
        lowered_session(folder, contract, slots=2),
    ):
        batch = [Positions(tokens=np.arange(5), cache_length=0, num_logits=0, slot=slot) for slot in (1, 0)]
        assert session.run_batch(batch).shape == (0,)
        assert session.top_tokens.shape == (0, 8)
        assert session.run_batch(batch, logits=np.empty((0, 320), np.float32)).shape == (0,)
        assert session.read_rows(0, 5, slot=1).any()
        assert session.read_rows(0, 5, slot=0).tobytes() == session.read_rows(0, 5, slot=1).tobytes()


@needs_library
def test_tokens_and_top_tokens_lie_in_one_buffer(llama):
    folder, contract, spec = llama
    session = native_session(folder, contract, spec, slots=2)
    batch = [Positions(tokens=np.arange(5), cache_length=0, num_logits=2, slot=slot) for slot in (1, 0)]
    addresses = set()
    for end in (1, 2):
        addresses.add((session.run_batch(batch[:end]).ctypes.data, session.top_tokens.ctypes.data))
    assert len(addresses) == 1


@needs_library
def test_a_cut_down_graph_has_hidden_states_and_no_tokens(tiny_engine):
    loaded = load_engine(tiny_engine, options=OnnxRuntimeOptions(kernels="native", slots=3))
    directory, contract = loaded.directory, loaded.session.contract
    session = OnnxRuntimeSession(
        directory.path,
        directory.path / "onnxruntime/native_probe.onnx",
        contract,
        num_layers=2,
        threads=1,
        library=toolchain.LIBRARY,
        slots=3,
    )
    assert session.max_sequences == 3
    fed = [np.arange(7), np.arange(20, 23)]
    hidden = [session.run_logits(tokens, 0, len(tokens)) for tokens in fed]
    both = np.empty((10, hidden[0].shape[1]), np.float32)
    batch = [
        Positions(tokens=tokens, cache_length=0, num_logits=len(tokens), slot=slot)
        for tokens, slot in zip(fed, (2, 1), strict=True)
    ]
    np.testing.assert_array_equal(session.run_batch(batch, logits=both), np.full(10, -1))
    np.testing.assert_array_equal(both, np.concatenate(hidden))
    assert session.top_tokens is None


@pytest.mark.parametrize("kernels", ["stock", "native"])
def test_slots_are_a_load_option(tiny_engine, kernels):
    if kernels == "native" and not toolchain.LIBRARY.is_file():
        pytest.skip("the native operators are not compiled")
    options = OnnxRuntimeOptions(kernels=kernels, slots=3, max_positions=512)
    session, plain = (
        load_engine(tiny_engine, options=one).session for one in (options, OnnxRuntimeOptions(kernels=kernels))
    )
    assert (session.num_slots, session.max_positions, session.max_logits_rows) == (3, 512, 512)
    assert session.max_sequences == (3 if kernels == "native" else 1)
    assert (plain.num_slots, plain.max_sequences, plain.max_positions) == (1, 1, 256)
    assert session.memory().cache == 3 * plain.memory().cache
    tokens = np.arange(9)
    batch = [Positions(tokens=tokens + slot, cache_length=0, num_logits=9, slot=slot) for slot in (2, 0, 1)]
    expected = np.concatenate([plain.run(tokens + slot, 0, 9).copy() for slot in (2, 0, 1)])
    np.testing.assert_array_equal(session.run_batch(batch), expected)


def test_a_session_that_shares_caches_has_their_slots(llama):
    folder, contract, _ = llama
    owner = lowered_session(folder, contract, slots=3)
    guest = OnnxRuntimeSession(folder, folder / "lowered.onnx", contract, threads=1, caches=owner.caches)
    assert guest.num_slots == 3
    owner.run(np.arange(6), 0, 1)
    np.testing.assert_array_equal(guest.run(np.arange(6, 9), 6, 3), owner.run(np.arange(6, 9), 6, 3))
    short = [(key, value[:2]) for key, value in owner.caches]
    with pytest.raises(EngineError, match=r"the cache to be shared is not float32 \[3, 2, 512, 16\] in every layer"):
        OnnxRuntimeSession(folder, folder / "lowered.onnx", contract, caches=short)


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@needs_library
def test_slots_that_nobody_wrote_take_no_memory(llama):
    folder, contract, spec = llama
    try:
        before = resident_bytes()
    except OSError:
        pytest.skip("this system does not say what is resident")
    session = native_session(folder, contract, spec, slots=1000)
    assert session.max_sequences == 256
    assert session.memory().cache > 300 << 20
    session.run_batch([Positions(tokens=np.arange(9), cache_length=0, num_logits=1, slot=999)])
    assert resident_bytes() - before < 100 << 20


def of(width=2, length=10, wanted=1, slot=0, parents=None):
    parents = None if parents is None else np.array(parents)
    return Positions(tokens=np.arange(width), cache_length=length, num_logits=wanted, slot=slot, parents=parents)


REFUSED = [
    ([], "a batch of 0 sequences came; 1 to 4 were expected"),
    ([of(slot=slot % 4) for slot in range(5)], "a batch of 5 sequences came; 1 to 4 were expected"),
    ([of(slot=4)], "cache slot 4 was named; 0 to 3 are there"),
    ([of(slot=-1)], "cache slot -1 was named; 0 to 3 are there"),
    ([of(slot=2), of(slot=2)], "sequences of one batch are in cache slots [2, 2]; each in another was expected"),
    ([of(width=0, wanted=0)], "a sequence of 0 positions with targets after 0 of them came"),
    ([of(wanted=3)], "a sequence of 2 positions with targets after 3 of them came"),
    ([of(wanted=-1)], "a sequence of 2 positions with targets after -1 of them came"),
    ([of(length=-1)], "2 positions after -1 do not fit a cache of 51"),
    ([of(length=511)], "2 positions after 511 do not fit a cache of 51"),
    ([of(), of(width=255, slot=1)], "257 positions were fed in one pass; this session takes up to 256"),
    ([of(slot=1), of(parents=[-1])], "parents are [-1]; for 2 tokens, as many indices of earlier ones (or -1)"),
    ([of(slot=1, parents=[-1, 0]), of(parents=[-1, 1])], "parents are [-1, 1]; for 2 tokens"),
    ([of(slot=1, parents=[-1, 0]), of(parents=[-2, 0])], "parents are [-2, 0]; for 2 tokens"),
    ([of(slot=1, parents=[-1]), of(parents=[-1, 0, 1])], "parents are [-1]; for 2 tokens"),
    ([of(slot=1), of(width=17, parents=range(-1, 16))], "a tree of 17 tokens was fed, but this engine has trees of up"),
]


@pytest.mark.parametrize("kernels", ["stock", "native"])
def test_what_does_not_fit_is_refused(llama, kernels):
    folder, contract, spec = llama
    if kernels == "native" and not toolchain.LIBRARY.is_file():
        pytest.skip("the native operators are not compiled")
    session = (
        native_session(folder, contract, spec, slots=SLOTS)
        if kernels == "native"
        else lowered_session(folder, contract, slots=SLOTS)
    )
    for batch, message in REFUSED:
        with pytest.raises(GenerationError, match=re.escape(message)):
            session.run_batch(batch)
    for bad in (np.empty((1, 320), np.float32), np.empty((4, 319), np.float32), np.empty((4, 320), np.float64)):
        with pytest.raises(ValueError, match=r"contiguous float32 \[2 or more, 320\] was expected"):
            session.run_batch([of(), of(slot=1)], logits=bad)
    rows = session.read_rows(0, 2)
    for call in (
        lambda: session.read_rows(0, 1, slot=4),
        lambda: session.write_rows(0, rows, slot=4),
        lambda: session.compact(0, [1], slot=-1),
    ):
        with pytest.raises(GenerationError, match="0 to 3 are there"):
            call()


def test_a_tree_into_an_empty_cache_is_refused_by_stock_kernels(llama):
    folder, contract, _ = llama
    session = lowered_session(folder, contract, slots=2)
    with pytest.raises(GenerationError, match="a tree was fed into an empty cache"):
        session.run_batch([of(slot=1), of(length=0, parents=[-1, -1])])


def test_sizes_that_make_no_session_are_refused(llama):
    folder, contract, _ = llama
    with pytest.raises(EngineError, match="slots is 0; 1 or more were expected"):
        lowered_session(folder, contract, slots=0)
    with pytest.raises(EngineError, match="max_positions is 255; 256 or more were expected"):
        OnnxRuntimeSession(folder, folder / "lowered.onnx", contract, max_positions=255)


def test_sessions_of_one_slot_take_one_sequence():
    session = TableSession(lambda context: len(context))
    assert (session.num_slots, session.max_sequences, session.max_positions) == (1, 1, 256)
    np.testing.assert_array_equal(session.run_batch([of(length=0, wanted=2)]), [1, 2])
    logits = np.empty((2, 100), np.float32)
    np.testing.assert_array_equal(session.run_batch([of(length=0, wanted=2)], logits=logits), [1, 2])
    np.testing.assert_array_equal(logits.argmax(axis=-1), [1, 2])
    with pytest.raises(GenerationError, match="a batch of 2 sequences came; this engine's passes take one"):
        session.run_batch([of(), of(slot=1)])
    with pytest.raises(GenerationError, match="a batch of 0 sequences came"):
        only_sequence([])
    with pytest.raises(GenerationError, match="cache slot 1 was named; 0 to 0 are there"):
        session.run_batch([of(slot=1)])
    for call in (
        lambda: session.read_rows(0, 1, slot=1),
        lambda: session.write_rows(0, np.zeros(1, np.float32), slot=1),
        lambda: session.compact(0, [0], slot=1),
    ):
        with pytest.raises(GenerationError, match="cache slot 1 was named"):
            call()


@needs_library
def test_native_graphs_have_the_ragged_form(llama):
    folder, contract, spec = llama
    session = native_session(folder, contract, spec)._session
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes[SEQUENCE_STARTS] == ["starts"]
    assert shapes["cache_slots"] == shapes["cache_lengths"] == ["batch"]
    assert shapes["tree_mask"] == ["tree_values"]
    assert shapes["input_ids"] == shapes["position_ids"] == [1, "tokens"]
    assert shapes["past_key_values.0.key"] == ["slots", 2, "capacity", 16]
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert outputs["present.0.value"] == ["slots", 2, "capacity", 16]
    assert outputs["next_tokens"] == [1, "rows"]
