"""The TensorRT session on host memory: bindings, profiles, aliasing, recorded work, and the whole loop."""

import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from engines import contract as names
from engines.gpu.host_device import HostDevice
from engines.probes.row_invariance import RowInvariance
from engines.session import Positions
from engines.tensorrt.bindings import check_bindings
from engines.tensorrt.host_memory import HostContext, HostEngine, host_plan
from engines.tensorrt.session import TensorRtSession
from engines.tree import ancestor_mask
from quasar.checkpoints import open_checkpoint
from quasar.errors import EngineError, GenerationError
from runtime.drafters import Draft, PromptLookup
from runtime.testing import run_loop
from tests.engines.test_tree import PARENTS
from tests.graphs import drop_top_tokens, export_graphs, host_session, likeliest, lowered_session, run_canonical

# The standard Attention operator on the CPU gives a single row other bits than it gives the same row among others.
EXACT = RowInvariance(chain=2, widest=16)


@pytest.fixture(scope="module")
def chains(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    return folder, export_graphs(open_checkpoint(str(tiny_model)), folder)


@pytest.fixture(scope="module")
def trees(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    return folder, export_graphs(open_checkpoint(str(tiny_model)), folder, tree_mask=True)


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    return folder, export_graphs(open_checkpoint(str(tiny_model)), folder, precision="w8a8")


def test_logits_are_those_of_the_onnxruntime_lowering(chains):
    folder, contract = chains
    tokens = np.random.default_rng(0).integers(0, 320, 300)
    session, other = host_session(folder, contract), lowered_session(folder, contract)
    for start, end in ((0, 256), (256, 264), (264, 265), (265, 297)):
        rows = min(end - start, contract.max_width)
        logits = session.run_logits(tokens[start:end], start, rows)
        # Another attention kernel sums in another order, in float32; seen: 3e-6.
        np.testing.assert_allclose(logits, other.run_logits(tokens[start:end], start, rows), atol=1e-5, rtol=0)
        np.testing.assert_array_equal(session.run(tokens[start:end], start, rows), logits.argmax(axis=-1))
    np.testing.assert_allclose(session.read_rows(0, 297), other.read_rows(0, 297), atol=1e-5, rtol=0)
    session.close()


def test_weights_of_4_bits_are_those_of_the_canonical_graph(tiny_model, tmp_path):
    contract = export_graphs(open_checkpoint(str(tiny_model)), tmp_path, precision="w4a16")
    tokens = np.random.default_rng(6).integers(0, 320, 40)
    expected = run_canonical(tmp_path, contract, tokens)[-8:]
    with host_session(tmp_path, contract) as session:
        session.run_logits(tokens[:32], 0, 1)
        # Float32 sums in another order.
        np.testing.assert_allclose(session.run_logits(tokens[32:], 32, 8), expected, atol=2e-5, rtol=0)


def test_top_tokens_come_with_the_call(chains):
    folder, contract = chains
    tokens = np.random.default_rng(11).integers(0, 320, 300)
    with host_session(folder, contract) as session:
        assert session.top_tokens.shape == (0, 8)
        # Both profiles; verify calls run, recorded and replayed, of all rows, of some, and of all again.
        for start, end, rows in ((0, 256, 32), *((256, 264, rows) for rows in (8, 8, 8, 3, 3, 3, 1, 8))):
            logits = session.run_logits(tokens[start:end], start, rows)
            np.testing.assert_array_equal(session.top_tokens, likeliest(logits, 8))
            next_tokens = session.run(tokens[start:end], start, rows)
            np.testing.assert_array_equal(session.top_tokens, likeliest(logits, 8))
            np.testing.assert_array_equal(session.top_tokens[:, 0], next_tokens)
        assert {key: replay.work is not None for key, replay in session._replays.items()} == {
            (8, 8): True, (8, 3): True, (8, 1): True
        }  # fmt: skip


def test_a_batch_has_one_sequence(chains):
    folder, contract = chains
    tokens = np.random.default_rng(12).integers(0, 320, 40)
    with host_session(folder, contract) as session:
        assert (session.num_slots, session.max_sequences, session.max_positions) == (1, 1, 256)
        # Of a prompt's chunk nothing is wanted.
        assert session.run_batch([Positions(tokens=tokens[:33], cache_length=0, num_logits=0)]).shape == (0,)
        assert session.top_tokens.shape == (0, 8)
        expected = session.run_logits(tokens[33:], 33, 5)
        batch = [Positions(tokens=tokens[33:], cache_length=33, num_logits=5)]
        logits = np.empty((6, 320), np.float32)
        np.testing.assert_array_equal(session.run_batch(batch, logits=logits), expected.argmax(axis=-1))
        np.testing.assert_array_equal(logits[:5], expected)
        np.testing.assert_array_equal(session.top_tokens, likeliest(expected, 8))
        np.testing.assert_array_equal(session.run_batch(batch), expected.argmax(axis=-1))
        with pytest.raises(GenerationError, match="a batch of 2 sequences came; this engine's passes take one"):
            session.run_batch([batch[0], replace(batch[0], slot=1)])
        rows = session.read_rows(0, 1)
        for call in (
            lambda: session.run_batch([replace(batch[0], slot=1)]),
            lambda: session.read_rows(0, 1, slot=1),
            lambda: session.write_rows(0, rows, slot=1),
            lambda: session.compact(0, [0], slot=1),
        ):
            with pytest.raises(GenerationError, match="cache slot 1 was named; 0 to 0 are there"):
                call()
        with pytest.raises(ValueError, match=r"contiguous float32 \[5 or more, 320\] was expected"):
            session.run_batch(batch, logits=logits[:4])


def test_a_call_copies_its_tokens_at_once(chains, monkeypatch):
    folder, contract = chains
    copies = []
    with host_session(folder, contract, graphs=False) as session:
        monkeypatch.setattr(session._device, "download", lambda target, address: copies.append(target.nbytes))
        session.run(np.arange(5), 0, 3)
    # 32 next tokens, and 8 likeliest of each row that was asked for.
    assert copies == [8 * 32 + 8 * 3 * 8]


def test_an_earlier_plan_has_no_top_tokens(chains, tmp_path):
    folder, contract = chains
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    drop_top_tokens(tmp_path / "canonical.onnx")
    earlier, tokens = replace(contract, top_k=0), np.arange(12)
    with host_session(folder, contract) as now, host_session(tmp_path, earlier) as session:
        np.testing.assert_array_equal(session.run(tokens, 0, 5), now.run(tokens, 0, 5))
        np.testing.assert_array_equal(session.run_logits(tokens, 0, 5), now.run_logits(tokens, 0, 5))
        assert session.top_tokens is None
        assert now.memory().buffers - session.memory().buffers == 64 * contract.max_width
    with pytest.raises(EngineError, match="tensors are not the contract's: top_tokens"):
        host_session(tmp_path, contract)


def test_recorded_work_gives_the_same_bits(chains):
    folder, contract = chains
    tokens = np.random.default_rng(1).integers(0, 320, 80)
    with host_session(folder, contract) as recorded, host_session(folder, contract, graphs=False) as plain:
        for start in range(0, 72, 6):
            # The same shapes come again with other tokens and lengths: run, record, replay, replay …
            rows = [one.run_logits(tokens[start : start + 6], start, 6) for one in (recorded, plain)]
            np.testing.assert_array_equal(*rows)
        replay = recorded._replays[6, 6]
        assert replay.work is not None
        assert not plain._replays


def test_work_that_cannot_be_recorded_runs_without(chains, monkeypatch, caplog):
    folder, contract = chains
    tokens = np.arange(40)
    with host_session(folder, contract) as session, host_session(folder, contract, graphs=False) as plain:
        upload, recording = session._device.upload, session._device.begin_capture

        def refuse(address, source):
            if session._device._recording is not None:
                raise EngineError("CUDA reports CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            upload(address, source)

        monkeypatch.setattr(session._device, "upload", refuse)
        assert recording is not None
        with caplog.at_level(logging.WARNING):
            for start in range(0, 32, 4):
                np.testing.assert_array_equal(
                    session.run(tokens[start : start + 4], start, 4), plain.run(tokens[start : start + 4], start, 4)
                )
        assert "cannot be recorded as a CUDA graph" in caplog.text
        assert len(caplog.records) == 1


class Knowing:
    """Drafts the text itself, as it was decoded before; every draft from place `wrong_from` on is off by one."""

    def __init__(self, prompt_length, text, wrong_from=99):
        self._prompt_length, self._text, self._wrong_from = prompt_length, text, wrong_from

    def propose(self, context, max_tokens):
        start = len(context) - self._prompt_length
        tokens = np.array(self._text[start : start + max_tokens], np.int64)
        tokens[self._wrong_from :] = (tokens[self._wrong_from :] + 1) % 320
        return Draft(tokens=tokens)


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_the_loop_is_exact_and_gives_the_onnxruntime_tokens(chains, quantized, precision):
    folder, contract = chains if precision == "fp32" else quantized
    random = np.random.default_rng(5)
    other = lowered_session(folder, contract)
    accepted = 0
    with host_session(folder, contract) as session:
        for length in (3, 31, 33, 70, 255, 256, 257, 300):
            prompt = random.integers(0, 320, length)

            def tokens(session, drafter, exact, prompt=prompt):
                rounds = run_loop(session, prompt, drafter=drafter, num_draft_tokens=5, max_new_tokens=24, exact=exact)
                return [token for one in rounds for token in one.tokens], sum(one.accepted for one in rounds)

            plain, _ = tokens(session, None, EXACT)
            for drafter in (PromptLookup(), Knowing(length, plain), Knowing(length, plain, wrong_from=3)):
                speculative, kept = tokens(session, drafter, EXACT)
                assert speculative == plain
                accepted += kept
            if precision == "fp32":
                assert plain == tokens(other, None, RowInvariance(chain=1, widest=32))[0]
    # The drafter that knows the text has all but the bonus tokens accepted.
    assert accepted > 8 * 16


def test_a_tree_gives_the_onnxruntime_logits_and_its_path_can_be_kept(trees):
    folder, contract = trees
    random = np.random.default_rng(7)
    prompt, fed, more = (random.integers(0, 320, size) for size in (50, len(PARENTS), 9))
    path = [0, 2, 4, 5]
    session, other = host_session(folder, contract), lowered_session(folder, contract)
    chain = host_session(folder, contract)
    for one in (session, other, chain):
        one.run(prompt, 0, 1)
    for _ in range(3):
        # Run, recorded, replayed.
        logits = session.run_logits(fed, 50, len(fed), PARENTS)
        np.testing.assert_allclose(logits, other.run_logits(fed, 50, len(fed), PARENTS), atol=1e-5, rtol=0)
    expected = chain.run_logits(fed[path], 50, len(path))
    np.testing.assert_allclose(logits[path], expected, atol=1e-5, rtol=0)
    for one in (session, other):
        one.compact(50, path)
        np.testing.assert_allclose(one.read_rows(50, 54), chain.read_rows(50, 54), atol=1e-5, rtol=0)
        continued = one.run_logits(more, 54, 9)
        np.testing.assert_allclose(continued, chain.run_logits(more, 54, 9), atol=1e-5, rtol=0)
    assert not ancestor_mask(PARENTS)[4, 1]


def test_a_plan_that_cannot_be_captured_runs_without_graphs(chains, caplog, monkeypatch):
    monkeypatch.setattr(HostContext, "is_stream_capturable", lambda self, stream: False, raising=False)
    folder, contract = chains
    with (
        caplog.at_level(logging.WARNING),
        host_session(folder, contract) as session,
        host_session(folder, contract, graphs=False) as plain,
    ):
        results = [session.run(np.arange(4), 0, 4).copy() for _ in range(3)]
        assert not session._graphs
        assert caplog.text.count("cannot be captured") == 1
        for result in results:
            np.testing.assert_array_equal(result, plain.run(np.arange(4), 0, 4))


def test_chains_take_no_tree(chains):
    folder, contract = chains
    with host_session(folder, contract) as session:
        with pytest.raises(GenerationError, match="no tree mask"):
            session.run(np.arange(6), 10, 6, PARENTS)
        with pytest.raises(GenerationError, match="takes no trees"):
            session.compact(10, [0, 2])


@pytest.mark.parametrize(
    ("width", "length", "rows", "message"),
    [
        (257, 0, 1, "257 tokens with 1 asked for were fed; this engine takes up to 256 tokens and gives up to 32 back"),
        (40, 0, 33, "gives up to 32 back"),
        (4, 0, 5, "4 tokens with 5 asked for"),
        (0, 0, 0, "0 tokens"),
        (8, 510, 1, "8 tokens after 510 do not fit a cache of 512"),
        (1, -1, 1, "after -1"),
    ],
)
def test_calls_out_of_bounds_are_refused(chains, width, length, rows, message):
    folder, contract = chains
    with host_session(folder, contract) as session, pytest.raises(GenerationError, match=message):
        session.run(np.zeros(width, np.int64), length, rows)


def test_the_context_refuses_what_tensorrt_refuses(chains):
    folder, contract = chains
    session = host_session(folder, contract)
    engine = session._plan.engine
    context = engine.create_execution_context("USER_MANAGED")
    with pytest.raises(RuntimeError, match="set optimization profile"):
        context.set_optimization_profile_async(2, 1)
    assert context.set_optimization_profile_async(0, 1)
    assert not context.set_input_shape(names.INPUT_IDS, (1, 33))
    assert engine.errors[-1] == (
        "IExecutionContext::setInputShape: Error Code 3: API Usage Error (Parameter check failed, condition: "
        "satisfyProfile. Set dimension [1, 33] for tensor input_ids does not satisfy any optimization profiles. "
        "Valid range for profile 0: [1, 1]..[1, 32].)"
    )
    assert not context.set_input_shape(names.INPUT_IDS, (33,))
    assert not context.set_input_shape("nobody", (1,))
    assert not context.set_tensor_address("nobody", 64)
    assert not context.execute_async_v3(session._device.stream)
    assert "input_ids has no shape" in engine.errors[-1]
    profile = engine.profiles[0]
    for name in engine.inputs:
        assert context.set_input_shape(name, profile[name][0])
    assert not context.execute_async_v3(session._device.stream)
    assert "Address is not set for input tensor input_ids" in engine.errors[-1]
    for name in engine.inputs:
        context.set_tensor_address(name, 1 << 20)
    assert not context.execute_async_v3(session._device.stream)
    assert "Neither address or allocator is set for output tensor next_tokens" in engine.errors[-1]
    for name in engine.outputs:
        context.set_tensor_address(name, 1 << 21)
    assert not context.execute_async_v3(session._device.stream)
    assert "aliases" in engine.errors[-1]
    assert not context.execute_async_v3(99)


def test_what_tensorrt_refuses_reaches_the_user(chains, monkeypatch):
    folder, contract = chains
    with host_session(folder, contract, graphs=False) as session:
        monkeypatch.setitem(session._plan.engine.profiles[0], names.INPUT_IDS, ((1, 1), (1, 2), (1, 3)))
        with pytest.raises(EngineError, match=r"TensorRT refused the shape \(1, 4\) of input_ids: IExecutionContext::"):
            session.run(np.arange(4), 0, 4)


def engine_of(chains, **changes):
    folder, contract = chains
    with host_session(folder, contract):
        pass
    engine = HostEngine(folder / "tensorrt.onnx", folder, contract, HostDevice())
    for name, value in changes.items():
        setattr(engine, name, value)
    return engine, contract


def test_a_plan_that_is_not_the_contracts_is_refused(chains):
    engine, contract = engine_of(chains)
    assert check_bindings(engine, contract).cache_type == "float32"
    with pytest.raises(EngineError, match=r"tensors are not the contract's: past_key_values\.3\.key"):
        check_bindings(engine, replace(contract, num_layers=4))
    with pytest.raises(EngineError, match="tree_mask"):
        check_bindings(engine, replace(contract, tree_mask=True))
    with pytest.raises(EngineError, match=r"profile verify takes input_ids from \(1, 1\) to \(1, 32\); .*\(1, 16\)"):
        check_bindings(engine, replace(contract, max_width=16))
    with pytest.raises(EngineError, match=r"does not update past_key_values\.0\.key in place"):
        check_bindings(engine_of(chains, get_aliased_input_tensor=lambda name: "")[0], contract)
    types = {names.INPUT_IDS: "INT32"}
    with pytest.raises(EngineError, match="tensors are not the contract's: top_tokens"):
        check_bindings(engine, replace(contract, top_k=0))
    wrong = engine_of(chains, get_tensor_dtype=lambda name: SimpleNamespace(name=types.get(name, "INT64")))[0]
    with pytest.raises(EngineError, match="tensor input_ids is INT32; INT64 was expected"):
        check_bindings(wrong, contract)
    engine.profiles = engine.profiles[:1]
    with pytest.raises(EngineError, match=r"has 1 profiles; verify, prefill were expected"):
        check_bindings(engine, contract)


def test_too_little_memory_says_what_would_fit(chains):
    folder, contract = chains
    with host_session(folder, contract) as session:
        plan = replace(session._plan)
        needed = (1 << 40) - session._device.free_bytes
        per_row = session._cache.bytes_per_position
    device = HostDevice(memory_bytes=needed - 40 * per_row)
    plan = host_plan(folder / "tensorrt.onnx", folder, contract, device)
    with pytest.raises(
        EngineError, match=r"the GPU has no room: .* the KV cache \d+ for 448 tokens.*--max-length 4\d\d,"
    ):
        TensorRtSession(plan, device, contract)
    assert device.closed
    device = HostDevice(memory_bytes=1 << 12)
    with pytest.raises(EngineError, match="no --max-length fits beside it"):
        TensorRtSession(host_plan(folder / "tensorrt.onnx", folder, contract, device), device, contract)


def test_closing_frees_everything_and_twice_is_once(chains):
    folder, contract = chains
    closed = []
    device = HostDevice()
    with host_session(folder, contract, device=device) as session:
        session._plan = replace(session._plan, before_close=lambda: closed.append(True))
        for _ in range(3):
            session.run(np.arange(4), 0, 4)
    session.close()
    assert closed == [True]
    assert device.closed
    assert not session._replays
    assert session._plan.engine is None


def test_drafts_in_a_tree_are_refused_by_the_loop(trees):
    folder, contract = trees

    class Tree:
        def propose(self, context, max_tokens):
            return Draft(tokens=np.array([1, 2]), parents=np.array([-1, -1]))

    with host_session(folder, contract) as session, pytest.raises(GenerationError, match="trees are not exact"):
        run_loop(session, np.arange(5), drafter=Tree(), num_draft_tokens=4, max_new_tokens=4, exact=EXACT)
