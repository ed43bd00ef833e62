"""Many sequences in a pass of the CUDA session, with its kernels in Triton's interpreter.

Run by test_batches.py, in a process of its own. QUASAR_TEST_ENGINE names the engine directory.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from engines.cuda.stand_in import stand_in_session
from engines.directory import open_directory
from engines.loaded import LoadedEngine
from engines.probes.batch_invariance import batches_are_exact
from engines.probes.prefill_invariance import prefill_is_exact
from engines.probes.row_invariance import RowInvariance
from engines.session import Positions
from quasar.errors import EngineError, GenerationError
from runtime.api import Engine
from tests.engines.batches import check_batches
from tests.engines.cuda.interpreted_session import program_of

SLOTS = 4
EXACT = RowInvariance(chain=1, widest=32, tree=True, prefill=True, batch=True)


@pytest.fixture(scope="module")
def directory():
    return open_directory(Path(os.environ["QUASAR_TEST_ENGINE"]))


@pytest.fixture(scope="module")
def program(directory, tmp_path_factory):
    return program_of(directory, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def session(directory, program):
    return stand_in_session(*program, directory.manifest.contract, slots=SLOTS)


@pytest.fixture(scope="module")
def alone(directory, program):
    """A session of one slot: every pass has the sizes of its one sequence."""
    return stand_in_session(*program, directory.manifest.contract)


def of(tokens, cache_length, num_logits, slot, parents=None):
    parents = None if parents is None else np.array(parents)
    return Positions(
        tokens=np.asarray(tokens), cache_length=cache_length, num_logits=num_logits, slot=slot, parents=parents
    )


@pytest.mark.parametrize("lengths", [None, [60, 300, 130, 95]])
def test_batches(session, alone, lengths):
    """Chunks, tokens, chains and trees in any slots, from empty caches, and over the ends of blocks and of a split:
    bits, tokens and every position of every slot are those of each sequence alone."""
    assert (session.num_slots, session.max_sequences, session.max_positions) == (SLOTS, SLOTS, 256)
    assert (session.max_logits_rows, alone.num_slots, alone.max_sequences) == (256, 1, 1)
    check_batches(session, alone, 0 if lengths is None else 1, rounds=2, chunk=(20, 40), lengths=lengths)


def test_a_batch_without_graphs(directory, program, alone):
    """Nothing is filled up where nothing is recorded."""
    session = stand_in_session(*program, directory.manifest.contract, slots=SLOTS, graphs=False)
    check_batches(session, alone, 2, rounds=1, chunk=(20, 40), lengths=[60, 300, 130, 95])


def test_recorded_batches_repeat(session, alone):
    """Three times the same sizes: run, recorded, replayed; with other tokens, lengths, slots and trees each time."""
    random = np.random.default_rng(3)
    recorded = len(session._graphs)
    for number, lengths in enumerate(((20, 30), (100, 9), (70, 40))):
        fed = [random.integers(0, 200, 2) for _ in lengths]
        batch = [
            of(one, length, 2, slot, [-1, -1] if number == place else None)
            for place, (one, length, slot) in enumerate(zip(fed, lengths, (3 - number, number), strict=True))
        ]
        for one in batch:
            rows = alone.read_rows(0, 101)
            rows[:] = random.integers(-2, 3, rows.shape)
            session.write_rows(0, rows, slot=one.slot)
        logits = np.empty((4, session.contract.vocab_size), np.float32)
        tokens = session.run_batch(batch, logits=logits).copy()
        for place, one in enumerate(batch):
            alone.write_rows(0, session.read_rows(0, 101, slot=one.slot))
            expected = alone.run_logits(one.tokens, one.cache_length, 2, one.parents)
            np.testing.assert_array_equal(logits[2 * place : 2 * place + 2], expected)
            np.testing.assert_array_equal(tokens[2 * place : 2 * place + 2], expected.argmax(axis=-1))
    assert len(session._graphs) == recorded + 1


def test_a_batch_may_want_nothing(session, alone):
    batch = [of(np.arange(5), 0, 0, slot) for slot in (1, 0)]
    assert session.run_batch(batch).shape == (0,)
    assert session.top_tokens.shape == (0, 8)
    assert session.run_batch(batch, logits=np.empty((0, session.contract.vocab_size), np.float32)).shape == (0,)
    assert session.read_rows(0, 5, slot=1).any()
    assert session.read_rows(0, 5, slot=0).tobytes() == session.read_rows(0, 5, slot=1).tobytes()
    # A chunk that wants nothing, beside a sequence that decodes.
    mixed = [of(np.arange(20), 0, 0, 2), of([5], 5, 1, 1)]
    alone.run(np.arange(5), 0, 1)
    expected = alone.run([5], 5, 1).copy()
    np.testing.assert_array_equal(session.run_batch(mixed), expected)
    assert session.top_tokens.shape == (1, 8)
    assert session.top_tokens[0, 0] == expected[0]


def test_more_rows_than_the_head_takes_at_a_time(session, alone):
    """Of one slot: 32 at a time, and of several 128; the same bits."""
    tokens = np.random.default_rng(4).integers(0, 200, 40)
    in_parts = alone.run_logits(tokens, 0, 40)
    top = alone.top_tokens.copy()
    np.testing.assert_array_equal(alone.run_batch([of(tokens, 0, 40, 0)]), in_parts.argmax(axis=-1))
    at_once = session.run_logits(tokens, 0, 40)
    np.testing.assert_array_equal(in_parts, at_once)
    np.testing.assert_array_equal(top, session.top_tokens)
    np.testing.assert_array_equal(alone.run_logits(tokens, 0, 8), in_parts[-8:])


def test_paths_are_compacted_in_their_slot(session):
    rows = session.read_rows(0, 12)
    rows[:] = np.arange(12)[:, None]
    for slot in range(SLOTS):
        session.write_rows(0, rows + slot, slot=slot)
    session.compact(4, [1, 3, 6], slot=2)
    for slot in range(SLOTS):
        expected = [*range(4), 5, 7, 10, *range(7, 12)] if slot == 2 else [*range(12)]
        np.testing.assert_array_equal(session.read_rows(0, 12, slot=slot)[0, 0, 0, :, 0], np.array(expected) + slot)


def test_what_does_not_fit_is_refused(session, directory, program):
    contract = directory.manifest.contract
    for batch, message in (
        ([], "a batch of 0 sequences came; 1 to 4 were expected"),
        ([of([1], 0, 1, slot % 4) for slot in range(5)], "a batch of 5 sequences came; 1 to 4 were expected"),
        ([of([1], 0, 1, 4)], "cache slot 4 was named; 0 to 3 are there"),
        ([of([1], 0, 1, 2), of([1], 0, 1, 2)], r"are in cache slots \[2, 2\]; each in another was expected"),
        ([of([1], 0, 2, 0)], "a sequence of 1 positions with targets after 2 of them came"),
        ([of([1, 2], contract.capacity - 1, 1, 3)], "2 positions after .* do not fit a cache of"),
        ([of(np.zeros(200, int), 0, 1, slot) for slot in (0, 1)], "400 positions were fed in one pass; .* up to 256"),
        ([of([1], 0, 1, 0), of([1, 2], 0, 1, 1, [-1, 1])], r"parents are \[-1, 1\]; for 2 tokens"),
    ):
        with pytest.raises(GenerationError, match=message):
            session.run_batch(batch)
    for call in (
        lambda: session.read_rows(0, 1, slot=SLOTS),
        lambda: session.write_rows(0, session.read_rows(0, 1), slot=-1),
        lambda: session.compact(0, [0], slot=SLOTS),
    ):
        with pytest.raises(GenerationError, match="0 to 3 are there"):
            call()
    with pytest.raises(ValueError, match=r"contiguous float32 \[2 or more, "):
        session.run_batch([of([1, 2], 0, 2, 1)], logits=np.empty((1, contract.vocab_size), np.float32))
    with pytest.raises(EngineError, match="slots is 0; 1 or more were expected"):
        stand_in_session(*program, contract, slots=0)


def test_requests_that_share_passes_get_the_tokens_that_they_get_alone(directory, session, program):
    """From prompts in chunks to drafts that compete."""
    record = dataclasses.replace(directory.manifest.record, row_invariance=EXACT)
    engine = Engine(LoadedEngine(directory=directory, record=record, backend="cuda", session=session))
    prompts = [[65, 66, 65, 66, 65], [70, 99, 70], [80, 81, 82, 80, 81], [90, 66, 90, 66]]
    options = {"max_new_tokens": 5, "ignore_eos": True}
    plain = [engine.generate(one, drafter="none", **options).token_ids for one in prompts]
    before = engine.metrics()
    together = engine.generate(prompts, drafter="prompt-lookup", num_draft_tokens=2, **options)
    assert [one.token_ids for one in together] == plain
    assert len(set(plain)) > 1
    now = engine.metrics()
    assert max(now.sequences_per_pass) == SLOTS
    # Five tokens of each, in hardly more passes than one sequence needs.
    assert now.passes - before.passes < 10


@pytest.mark.skipif(not os.environ.get("QUASAR_TEST_FULL"), reason="the widest passes take seconds each")
def test_the_probes_find_it_exact(session):
    assert prefill_is_exact(session, EXACT, positions=2)
    assert batches_are_exact(session, trees=True, batches=2)
