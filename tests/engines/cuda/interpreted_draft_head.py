"""A draft head on CUDA with its kernels in Triton's interpreter, against the CPU's of the same weights.

Run by test_draft_head.py: interpreted kernels need a process of their own. QUASAR_TEST_ENGINES names directories of
engines that have a head.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

import runtime
from engines.cuda.stand_in import stand_in_sessions
from engines.directory import open_directory
from engines.loaded import LoadedEngine
from engines.onnxruntime.draft_head import OnnxRuntimeDraftHead
from engines.onnxruntime.files import onnxruntime_files
from engines.probes.row_invariance import RowInvariance
from engines.session import Positions
from export.cuda_head_program import write_head_programs
from export.cuda_program import write_program
from export.layout import CANONICAL
from plugins.cpu.toolchain import LIBRARY
from runtime.api import Engine

ENGINES = {Path(path).parent.name: Path(path) for path in os.environ["QUASAR_TEST_ENGINES"].split(os.pathsep)}
EXACT = RowInvariance(chain=1, widest=32, tree=True, prefill=True)
SLOTS = 2


@pytest.fixture(scope="module", params=ENGINES)
def directory(request):
    return open_directory(ENGINES[request.param])


@pytest.fixture(scope="module")
def sessions(directory, tmp_path_factory):
    """With caches in float32, as the CPU's: kernels of those are not offered, but differ in nothing else."""
    return sessions_of(directory, tmp_path_factory.mktemp("cuda"), "float32")


def sessions_of(directory, folder, cache_type):
    """The verifier's session and its head's."""
    manifest, weights = directory.manifest, folder / "weights.bin"
    graphs = (onnxruntime_files(manifest).native_graph, CANONICAL)
    program = write_program(directory.path, graphs, manifest.contract, manifest.linears, weights, cache_type)
    programs = write_head_programs(directory.path, manifest.draft_head, manifest.contract, program, weights)
    return stand_in_sessions(
        programs.verifier, programs.head, weights, manifest.contract, manifest.draft_head, slots=SLOTS
    )


@pytest.fixture(scope="module")
def reference(directory):
    manifest = directory.manifest
    return OnnxRuntimeDraftHead(
        directory.path, manifest.draft_head, manifest.contract, library=LIBRARY, threads=1, slots=SLOTS
    )


@pytest.fixture(scope="module")
def cpu(directory):
    with runtime.load(directory.path, backend="onnxruntime", threads=1) as engine:
        yield engine


def near(came, expected):
    """Sums are in other orders, and a value within that of a step of INT8 moves by a whole one, 1/127 of the largest of
    its token or block: that is rare, and a step of few."""
    assert came.shape == expected.shape
    off, size = np.abs(came - expected), np.abs(expected).mean()
    assert np.median(off) < 1e-3 * size
    assert off.max() < 0.1 * size


def test_what_the_verifier_tells_is_what_the_heads_graph_makes(sessions, reference, cpu, directory):
    session, head = sessions
    tokens = np.arange(12) * 7 % 200
    session.run(tokens, 0, 1)
    (told,) = session.hidden_states
    verifier = cpu._loaded.session
    verifier.run(tokens, 0, 1)
    near(told, reference.fuse(verifier.hidden_states))
    np.testing.assert_array_equal(head.fuse([told]), told)
    # A verify pass that is recorded tells the same as one that is launched.
    fed = [session.run(tokens[:3], 12, 3) is not None and session.hidden_states[0].copy() for _ in range(3)]
    np.testing.assert_array_equal(fed[0], fed[1])
    np.testing.assert_array_equal(fed[0], fed[2])
    assert session.hidden_states[0].shape == (3, head.hidden_size)


def test_steps_are_those_of_the_cpu(sessions, reference, directory):
    """A prompt in two chunks, a tree of two, and what follows one of them; then two sequences in one step."""
    _, head = sessions
    random, hidden = np.random.default_rng(1), head.hidden_size
    ids = random.integers(0, directory.manifest.contract.vocab_size, 20)
    states = random.standard_normal((20, hidden)).astype(np.float32)

    def both(positions, given):
        came, expected = head.run(positions, given), reference.run(positions, given)
        near(came.log_probabilities, expected.log_probabilities)
        near(came.hidden_states, expected.hidden_states)
        agree = (came.tokens[:, 0] == expected.tokens[:, 0]).mean()
        # The best two of random logits are rarely as near as rounding is.
        assert agree >= 0.5
        return expected

    both([Positions(tokens=ids[:13], cache_length=0, num_logits=2, slot=1)], states[:13])
    told = both([Positions(tokens=ids[13:], cache_length=13, num_logits=1, slot=1)], states[13:])
    last, tokens = told.hidden_states[-1:].copy(), told.tokens[-1, :2].copy()
    tree = Positions(tokens=tokens, cache_length=20, num_logits=2, slot=1, parents=np.array([-1, -1]))
    told = both([tree], np.repeat(last, 2, axis=0))
    branch = Positions(tokens=np.array([tokens[1], told.tokens[1, 0]]), cache_length=20, num_logits=1, slot=1)
    following = np.concatenate([last, told.hidden_states[1:2]])
    alone = dataclasses.replace(head.run([branch], following))
    likelihoods = alone.log_probabilities.copy()
    other = Positions(tokens=ids[:3], cache_length=0, num_logits=2, slot=0)
    # What a step says of a sequence does not depend on who else is in it; the third time it is replayed.
    for _ in range(3):
        together = head.run([other, branch], np.concatenate([states[:3], following]))
        np.testing.assert_array_equal(together.log_probabilities[2:], likelihoods)
    head.copy_rows(1, 0, 0, 20)
    moved = head.run([dataclasses.replace(branch, slot=0)], following)
    np.testing.assert_array_equal(moved.log_probabilities, likelihoods)
    assert np.exp(likelihoods).sum() < 1
    # Numbers that are none stay with their sequence, and are no fault.
    broken = head.run([other, branch], np.concatenate([np.full((3, hidden), np.nan, np.float32), following]))
    assert np.isnan(broken.log_probabilities[:2]).all()
    np.testing.assert_array_equal(broken.log_probabilities[2:], likelihoods)
    with pytest.raises(ValueError, match=r"an array \[2, \d+\] came; \[3, \d+\] was expected"):
        head.run([other], states[:2])


def test_decoding_with_the_head(directory, tmp_path):
    """Drafts of the head give the tokens of plain decoding, greedy and drawn."""
    session, head = sessions_of(directory, tmp_path, "float16")
    record = dataclasses.replace(directory.manifest.record, row_invariance=EXACT)
    loaded = LoadedEngine(directory=directory, record=record, backend="cuda", session=session, draft_head=head)
    engine, drafted = Engine(loaded), 0
    for prompt, options in (([65, 70, 65], {}), ([80, 99, 4, 80], {"temperature": 0.9, "seed": 3})):
        plain = engine.generate(prompt, max_new_tokens=6, drafter="none", ignore_eos=True, **options)
        found = engine.generate(
            prompt, max_new_tokens=6, drafter="eagle", num_draft_tokens=3, ignore_eos=True, **options
        )
        assert found.token_ids == plain.token_ids
        drafted += sum(one.drafted for one in found.stats.sources)
    assert drafted >= 12
    engine.close()
    # Its steps went with the verifier's device.
    head.close()
