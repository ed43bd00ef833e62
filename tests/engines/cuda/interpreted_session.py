"""The CUDA session with its kernels in Triton's interpreter, against the CPU engine of the same weights.

Run by test_session.py: interpreted kernels need a process of their own. QUASAR_TEST_ENGINES names engine directories,
QUASAR_TEST_PROMPTS is how many prompts are decoded.
"""

import dataclasses
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import runtime
from engines.cuda.program import Attention
from engines.cuda.stand_in import stand_in_session
from engines.directory import open_directory
from engines.loaded import LoadedEngine
from engines.onnxruntime.files import onnxruntime_files
from engines.probes.row_invariance import RowInvariance
from engines.session import Positions, fill_randomly
from export.cuda_program import write_program
from export.layout import CANONICAL
from plugins.gpu.variants import SPLIT, num_splits
from quasar.errors import EngineError, GenerationError
from runtime.api import Engine
from runtime.drafters.base import NO_DRAFT, Draft

ENGINES = {Path(path).parent.name: Path(path) for path in os.environ["QUASAR_TEST_ENGINES"].split(os.pathsep)}
EXACT = RowInvariance(chain=1, widest=32, tree=True, prefill=True)
# Repeated tokens, so that looking them up drafts something.
PROMPTS = [[first, second, first] for first in (65, 70, 80, 90) for second in (66, 99)]
PROMPTS = PROMPTS[: int(os.environ["QUASAR_TEST_PROMPTS"])]
NEW_TOKENS = 5


def program_of(directory, folder, cache_type=None):
    manifest = directory.manifest
    cache_type = cache_type or manifest.contract.kv_dtype
    graphs = (onnxruntime_files(manifest).native_graph, CANONICAL)
    weights = folder / f"weights-{cache_type}.bin"
    return write_program(directory.path, graphs, manifest.contract, manifest.linears, weights, cache_type), weights


@pytest.fixture(scope="module", params=ENGINES)
def directory(request):
    return open_directory(ENGINES[request.param])


@pytest.fixture(scope="module")
def program(directory, tmp_path_factory):
    return program_of(directory, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def session(directory, program):
    return stand_in_session(*program, directory.manifest.contract)


@pytest.fixture(scope="module")
def engine(directory, session):
    record = dataclasses.replace(directory.manifest.record, row_invariance=EXACT)
    return Engine(LoadedEngine(directory=directory, record=record, backend="cuda", session=session))


@pytest.fixture(scope="module")
def reference(directory):
    with runtime.load(directory.path, backend="onnxruntime") as loaded:
        yield loaded


class GoodTree:
    """Drafts a tree whose path to the right tokens lies among wrong ones; the right ones come from plain decoding."""

    name = "good-tree"

    def __init__(self, tokens):
        self._tokens = tokens

    def propose(self, context, max_tokens):
        rest = self._tokens[len(context) :][: max_tokens // 2]
        if not len(rest):
            return NO_DRAFT
        tokens, parents, parent = [], [], -1
        for token in rest:
            # A wrong sibling first, so that the path does not lie in order.
            tokens += [(token + 1) % 200, token]
            parents += [parent, parent]
            parent = len(tokens) - 1
        return Draft(tokens=np.array(tokens, np.int64), parents=np.array(parents, np.int64))


def test_decoding(engine, reference):
    """Plain decoding gives the CPU engine's tokens; chains and trees give those of plain decoding."""
    for prompt in PROMPTS:
        plain = engine.generate(prompt, max_new_tokens=NEW_TOKENS, drafter="none")
        there = reference.generate(prompt, max_new_tokens=NEW_TOKENS, drafter="none")
        assert plain.token_ids == there.token_ids
        chain = engine.generate(prompt, max_new_tokens=NEW_TOKENS, drafter="prompt-lookup", num_draft_tokens=4)
        assert chain.token_ids == plain.token_ids
        context = np.array([*prompt, *plain.token_ids])
        tree = engine.generate(prompt, max_new_tokens=NEW_TOKENS, drafter=GoodTree(context), num_draft_tokens=8)
        assert tree.token_ids == plain.token_ids
        assert tree.stats.rounds < plain.stats.rounds


def test_logits_are_near_the_cpu_engines(session, reference, directory):
    """Both sum floats, in other orders. INT8 rounding is a step: where an activation lies within that of one, it moves
    by 1/127 of its token's largest, which is rare."""
    tokens = np.arange(20) % directory.manifest.contract.vocab_size
    logits = session.run_logits(tokens, 0, 20)
    other = reference._loaded.session.run_logits(tokens, 0, 20)
    assert np.median(np.abs(logits - other)) < 1e-4 * np.abs(other).mean()
    np.testing.assert_array_equal(session.top_tokens, np.argsort(-logits, axis=1, kind="stable")[:, :8])


def test_a_position_has_one_value(session, directory):
    """Over the end of a block and of a split: one by one, as a chain, in a prompt's chunk, on a path of a tree."""
    contract = directory.manifest.contract
    tokens = np.random.default_rng(0).integers(0, 200, contract.max_length)
    length = SPLIT + 64 + 20
    # What is cached before: an interpreter would take half a minute to compute it.
    fill_randomly(session, np.random.default_rng(1), 0, length - 40)
    prompt = session.run_logits(tokens[length - 40 : length], length - 40, 8)
    one_by_one = [session.run_logits(tokens[length - 8 + i : length - 7 + i], length - 8 + i, 1) for i in range(8)]
    np.testing.assert_array_equal(np.concatenate(one_by_one), prompt)
    after = session.run_logits(tokens[length - 8 : length], length - 8, 8)
    np.testing.assert_array_equal(after, prompt)
    parents = [-1, -1, 1, 1, 3, 0, 4, 6]
    path = [1, 3, 4, 6, 7]
    tree = np.full(8, 7)
    tree[path] = tokens[length - 8 : length - 3]
    cached = session.run_logits(tree, length - 8, 8, parents)
    np.testing.assert_array_equal(cached[path], prompt[:5])
    session.compact(length - 8, path)
    np.testing.assert_array_equal(session.run_logits(tokens[length - 3 : length], length - 3, 3), prompt[5:])


def test_recorded_passes_repeat(session):
    """The first pass of a kind runs, the second is recorded, and the recording serves other lengths and tokens."""
    tokens = np.arange(60) % 200
    fed = [session.run_logits(tokens[:10], 0, 1)]
    fed += [session.run_logits(tokens[10:12], 10, 2) for _ in range(3)]
    for one, other in pairwise(fed[1:]):
        np.testing.assert_array_equal(one, other)
    moved = session.run_logits(tokens[12:14], 12, 2)
    assert not np.array_equal(moved, fed[-1])
    # A batch of one sequence is the same pass.
    logits = np.empty((2, moved.shape[1]), np.float32)
    batch = [Positions(tokens=tokens[12:14], cache_length=12, num_logits=2)]
    np.testing.assert_array_equal(session.run_batch(batch, logits=logits), moved.argmax(axis=-1))
    np.testing.assert_array_equal(logits, moved)
    np.testing.assert_array_equal(session.run_batch(batch), moved.argmax(axis=-1))
    assert session.run_batch([dataclasses.replace(batch[0], num_logits=0)]).shape == (0,)
    assert len(session.top_tokens) == 0


def test_bfloat16_caches(directory, tmp_path, reference):
    session = stand_in_session(*program_of(directory, tmp_path, "bfloat16"), directory.manifest.contract)
    tokens = np.arange(20)
    logits, other = session.run_logits(tokens, 0, 20), reference._loaded.session.run_logits(tokens, 0, 20)
    assert np.abs(logits - other).mean() < 0.1 * np.abs(other).mean()
    rows = session.read_rows(3, 9)
    assert rows.dtype == np.uint16
    session.write_rows(3, rows[..., ::-1, :])
    np.testing.assert_array_equal(session.read_rows(3, 9), rows[..., ::-1, :])


def test_what_does_not_fit_is_refused(session, directory, program):
    contract = directory.manifest.contract
    with pytest.raises(GenerationError, match="were fed in one pass; this session takes up to"):
        session.run([1] * (contract.prefill_chunk + 1), 0, 1)
    with pytest.raises(GenerationError, match="do not fit a cache"):
        session.run([1, 2], contract.capacity - 1, 1)
    with pytest.raises(GenerationError, match="a batch of 2 sequences came; 1 to 1 were expected"):
        session.run_batch([Positions(tokens=np.arange(2), cache_length=0, num_logits=1, slot=slot) for slot in (0, 1)])
    needed = session.memory()
    with pytest.raises(EngineError, match=r"the GPU has no room: the weights take .*build with --max-length"):
        stand_in_session(*program, contract, memory_bytes=needed.weights + needed.buffers + needed.cache // 2)
    with pytest.raises(EngineError, match="no --max-length fits"):
        stand_in_session(*program, contract, memory_bytes=needed.weights)
    assert any(isinstance(step, Attention) for step in program[0].steps)
    assert num_splits(0, 32) == 0
