"""The session: one allocation, in-place caches, rows as asked for; the integer check; kernels as they ran."""

import shutil

import numpy as np
import pytest

from engines.loading import load_engine
from engines.onnxruntime.executed import check_integer_matmuls, executed_kernels
from engines.onnxruntime.files import onnxruntime_files
from engines.onnxruntime.graphs import Graphs
from engines.onnxruntime.kernels import Kernels
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.onnxruntime.probing import (
    needs_exact_integers,
    stock_integers_are_exact,
    this_machine,
)
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.probes import integer_check
from plugins.cpu import toolchain
from quasar.errors import EngineError
from tests.graphs import as_built_earlier, likeliest


@pytest.fixture
def loaded(tiny_engine):
    return load_engine(tiny_engine)


def test_rows_are_the_last_ones_and_logits_agree(loaded):
    tokens = np.arange(20)
    all_rows = loaded.session.run(tokens, 0, 20).copy()
    np.testing.assert_array_equal(loaded.session.run(tokens, 0, 3), all_rows[-3:])
    logits = loaded.session.run_logits(tokens, 0, 20)
    np.testing.assert_array_equal(logits.argmax(axis=-1), all_rows)


def test_top_tokens_are_those_of_the_latest_call_and_lie_in_one_buffer(loaded):
    session, tokens = loaded.session, np.arange(20)
    assert session.top_tokens.shape == (0, 8)
    logits = session.run_logits(tokens, 0, 20)
    address = session.top_tokens.ctypes.data
    np.testing.assert_array_equal(session.top_tokens, likeliest(logits, 8))
    for rows in (1, 3, 20, 3):
        next_tokens = session.run(tokens, 0, rows)
        assert session.top_tokens.shape == (rows, 8)
        assert session.top_tokens.ctypes.data == address
        np.testing.assert_array_equal(session.top_tokens[:, 0], next_tokens)
        np.testing.assert_array_equal(session.top_tokens, likeliest(logits[-rows:], 8))


@pytest.mark.parametrize("kernels", ["stock", "native"])
def test_an_earlier_engine_runs_without_top_tokens(tiny_engine, tmp_path, kernels):
    if kernels == "native" and not toolchain.LIBRARY.is_file():
        pytest.skip("the native operators are not compiled")
    now = load_engine(tiny_engine, options=OnnxRuntimeOptions(kernels=kernels)).session
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    as_built_earlier(engine)
    session = load_engine(engine, options=OnnxRuntimeOptions(kernels=kernels)).session
    assert session.contract.top_k == 0
    np.testing.assert_array_equal(session.run(np.arange(9), 0, 9), now.run(np.arange(9), 0, 9))
    np.testing.assert_array_equal(session.run_logits(np.arange(9), 0, 9), now.run_logits(np.arange(9), 0, 9))
    assert session.top_tokens is None
    # A row's top tokens are 64 bytes in the buffers of a new engine.
    assert now.memory().buffers - session.memory().buffers == 64 * session.max_logits_rows


def test_a_cut_down_graph_has_no_top_tokens(loaded, tiny_engine):
    files = stock_files(loaded.directory)
    session = OnnxRuntimeSession(tiny_engine, files.probe, loaded.directory.manifest.contract, num_layers=2)
    session.run_logits(np.arange(5), 0, 5)
    assert session.top_tokens is None


def test_caches_are_written_in_place_and_only_where_rows_are(loaded):
    session = loaded.session
    pointers = [cache.ctypes.data for pair in session.caches for cache in pair]
    for pair in session.caches:
        for cache in pair:
            cache[:] = 7
    session.run(np.arange(5), 10, 5)
    assert [cache.ctypes.data for pair in session.caches for cache in pair] == pointers
    for pair in session.caches:
        for cache in pair:
            assert (cache[:, :, :10] == 7).all()
            assert (cache[:, :, 10:15] != 7).any(axis=(0, 1, 3)).all()
            # One spare position after the new ones is junk; the rest is untouched.
            assert (cache[:, :, 16:] == 7).all()


def test_rejected_positions_are_overwritten(loaded):
    """Truncate, then continue: the same as a fresh prefill, bit for bit."""
    session, tokens = loaded.session, np.random.default_rng(0).integers(0, 256, 40)
    fresh = session.run_logits(tokens, 0, 40)[-1].copy()
    session.run(tokens[:20], 0, 1)
    session.run(np.full(9, 99), 20, 9)
    continued = session.run_logits(tokens[20:], 20, 20)[-1]
    np.testing.assert_array_equal(continued, fresh)


def stock_files(directory):
    return Graphs.of(directory.path, onnxruntime_files(directory.manifest), Kernels())


def test_every_int8_linear_runs_as_an_integer_matmul(loaded, tiny_engine):
    files = stock_files(loaded.directory)
    kernels = executed_kernels(tiny_engine, files.graph, loaded.directory.manifest.contract)
    linears = loaded.directory.manifest.linears
    assert check_integer_matmuls(kernels, linears) == len(linears) == 13
    kernels["layers.1.mlp.down_proj.matmul"] = "MatMul"
    with pytest.raises(EngineError, match=r"layers\.1\.mlp\.down_proj ran as MatMul"):
        check_integer_matmuls(kernels, linears)


def test_integers_are_exact_on_this_machine(loaded):
    files = stock_files(loaded.directory)
    # x86 without VNNI may add pairs of products in 16 bits, unless it is asked not to; with VNNI it adds in 32.
    if {"avx512_vnni", "avx_vnni"} & {*this_machine(0, Kernels()).instruction_sets}:
        assert stock_integers_are_exact(files.integer_check)
    assert stock_integers_are_exact(files.integer_check, exact_integers=True)


def test_integer_check_notices_saturation(loaded, monkeypatch):
    """Sums of pairs cut to 16 bits, as x86 kernels without VNNI do, differ from the right ones."""
    files = stock_files(loaded.directory)
    weights, inputs = integer_check.check_weights().astype(np.int64), integer_check.check_inputs().astype(np.int64)
    shifted = inputs + 128
    pairs = shifted[:, 0::2, None] * weights[None, 0::2] + shifted[:, 1::2, None] * weights[None, 1::2]
    saturated = np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1) - 128 * weights.sum(axis=0)
    assert (saturated != inputs @ weights).any(axis=1).sum() > 3

    answers = {}
    monkeypatch.setattr(
        "engines.onnxruntime.probing.stock_integers_are_exact",
        lambda graph, threads=0, exact_integers=False: answers[exact_integers],
    )
    answers |= {False: True, True: True}
    assert not needs_exact_integers(files, threads=0)
    answers |= {False: False, True: True}
    assert needs_exact_integers(files, threads=0)
    answers |= {False: False, True: False}
    with pytest.raises(EngineError, match="integer matmuls of extreme values are not exact"):
        needs_exact_integers(files, threads=0)


def test_a_graph_that_cannot_be_loaded_is_an_engine_error(loaded, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot be loaded by ONNX Runtime"):
        OnnxRuntimeSession(tmp_path, tmp_path / "broken.onnx", loaded.directory.manifest.contract)
