"""Engines that draft for another: the verifier's tokens and cache, whatever they propose."""

import dataclasses
import itertools
import json
import logging
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import runtime
from engines import OnnxRuntimeOptions
from engines.loading import load_engine
from engines.manifest import Manifest
from quasar.errors import EngineError, GenerationError
from quasar.files import sha256_file
from runtime.drafters import PromptLookup, Recycling, draft_engine
from runtime.drafters.agreement import check_vocabularies
from runtime.drafters.draft_engine import DraftEngine, EngineDrafter
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

PROMPT = "one two three one two three one two"


@pytest.fixture(scope="module")
def float_engine(tiny_model, build_engine):
    return build_engine(tiny_model, precision="fp32")


@pytest.fixture(scope="module")
def unsmoothed(tiny_model, build_engine):
    """W8A8 without smoothing: its cache holds what the float engine's does, up to rounding."""
    return build_engine(tiny_model, alpha="off")


@pytest.fixture(scope="module")
def verifier(float_engine):
    with runtime.load(float_engine) as engine:
        yield engine


@pytest.mark.parametrize("kind", ["model", "self", "hierarchical", "levels"])
@pytest.mark.parametrize("k", [1, 3, 6, None])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3, "top_p": 0.95}], ids=["greedy", "drawn"])
def test_tokens_and_cache_are_the_verifiers_own(verifier, tiny_engine, unsmoothed, kind, k, options):
    session = verifier._resources.loaded.session
    drafter = f"{kind}:{unsmoothed if kind == 'self' else tiny_engine}"
    if kind == "levels":
        drafter = f"hierarchical:{tiny_engine}+{unsmoothed}"
    for prompt in (PROMPT, "abc " * 40):
        plain = verifier.generate(prompt, max_new_tokens=50, drafter="none", ignore_eos=True, **options)
        length = len(verifier.encode(prompt)) + len(plain.token_ids) - 1
        expected = session.read_rows(0, length)
        fast = verifier.generate(
            prompt, max_new_tokens=50, drafter=drafter, num_draft_tokens=k, ignore_eos=True, **options
        )
        assert fast.token_ids == plain.token_ids
        np.testing.assert_array_equal(session.read_rows(0, length), expected)
        if k is not None:
            # The same model with rounded weights: mostly right.
            assert fast.stats.accepted > 0.3 * fast.stats.drafted > 0
            assert {one.drafter for one in fast.stats.drafts} <= {drafter, ""}


def test_cache_after_every_round_is_what_the_verifier_committed(verifier, unsmoothed):
    """QSpec's claim: drafts leave no trace in the committed positions."""
    session = verifier._resources.loaded.session
    options = {"max_new_tokens": 40, "ignore_eos": True}
    plain = verifier.generate(PROMPT, drafter="none", **options)
    start = len(verifier.encode(PROMPT))
    expected = session.read_rows(0, start + 39)
    committed = start
    for event in verifier.stream(PROMPT, drafter=f"self:{unsmoothed}", num_draft_tokens=4, **options):
        length = committed + len(event.token_ids) - 1
        np.testing.assert_array_equal(session.read_rows(0, length), expected[..., :length, :])
        committed += len(event.token_ids)
    assert committed == start + len(plain.token_ids)


# W4A16, whose graph for drafts has INT8 activations (QSpec); W8A8, whose own reads half of the cache's bits; and both.
FASTER = {
    "activations": {"precision": "w4a16"},
    "cache": {"kv_dtype": "int8-tiers"},
    "both": {"precision": "w4a16", "kv_dtype": "int8-tiers"},
}


@pytest.fixture(scope="module", params=FASTER)
def faster_engine(request, tiny_model, shared_engine):
    return shared_engine(tiny_model, kernels="native", **FASTER[request.param])


@needs_library
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3, "top_p": 0.95}], ids=["greedy", "drawn"])
def test_an_engine_drafts_for_itself_in_a_faster_graph(faster_engine, options):
    """QSpec, QuantSpec: one set of weights, one cache, and the verifier's own positions in it after every round."""
    with runtime.load(faster_engine) as engine:
        session = engine._resources.loaded.session
        own = {"max_new_tokens": 40, "ignore_eos": True, **options}
        plain = engine.generate(PROMPT, drafter="none", **own)
        start = len(engine.encode(PROMPT))
        expected = session.read_rows(0, start + 39)
        committed, tokens, stats = start, (), None
        for event in engine.stream(PROMPT, drafter="self", num_draft_tokens=4, **own):
            length = committed + len(event.token_ids) - 1
            np.testing.assert_array_equal(session.read_rows(0, length), expected[..., :length, :])
            committed += len(event.token_ids)
            tokens += event.token_ids
            stats = event.stats or stats
        assert tokens == plain.token_ids
        # A random model is unsure of every token: half of a key's bits change many, and still not most of all.
        assert stats.accepted > 0.2 * stats.drafted > 0
        assert {one.drafter for one in stats.drafts} <= {"self", ""}
        # The weights are those that are mapped already; the cache is the verifier's.
        [drafting] = engine._resources.draft_engines._loaded.values()
        assert drafting.shares_cache
        assert drafting.loaded.session.caches[0][0] is session.caches[0][0]
        assert engine.memory().drafters == 0


@needs_library
def test_tokens_that_the_verifier_was_not_fed_are_read_before_it_drafts(tiny_model, shared_engine):
    """Under a grammar, forced tokens follow the pending one: nobody has written their positions yet."""
    with runtime.load(shared_engine(tiny_model, kernels="native", **FASTER["activations"])) as engine:
        session, own = engine._resources.loaded.session, engine._resources.draft_engines.open_own()
        # What was measured of the verifier says nothing of the graph that drafts.
        assert own.agreement is None
        prompt = np.arange(20, 45)
        session.run(prompt, 0, 1)
        context = np.append(prompt, [7, 8, 9, 10])
        foreign = np.full_like(session.read_rows(25, 60), 9.0)
        drafted = {}
        for committed in (25, None):
            session.write_rows(25, foreign)
            drafted[committed] = own.draft(context, 4, None, committed=committed)
            written = (session.read_rows(25, 29) != 9.0).any(axis=(0, 1, 2, 4))
            assert written.tolist() == ([True] * 4 if committed else [False] * 3 + [True])
        # As after a pass that fed them.
        session.run(context[:-1], 0, 1)
        assert drafted[25] == own.draft(context, 4, None)
        told = []
        draft = own.draft
        own.draft = lambda *given, **named: told.append((len(given[0]), named["committed"])) or draft(*given, **named)
        engine.generate(PROMPT, drafter="self", num_draft_tokens=2, max_new_tokens=8, ignore_eos=True)
        assert told
        assert all(committed == length - 1 for length, committed in told)


def test_an_engine_of_one_form_has_no_self(verifier, float_engine):
    with pytest.raises(EngineError, match=f"{float_engine} has no graph to draft with for itself"):
        verifier.generate(PROMPT, drafter="self")


def test_layers_can_be_skipped_on_the_verifiers_cache(verifier, tiny_model, build_engine):
    """The rest of the layers read and write their own positions; all are the verifier's again after its pass."""
    session = verifier._resources.loaded.session
    drafter = f"self:{build_engine(tiny_model, precision='fp32', skip_layers='1')}"
    options = {"max_new_tokens": 40, "ignore_eos": True}
    plain = verifier.generate(PROMPT, drafter="none", **options)
    length = len(verifier.encode(PROMPT)) + 39
    expected = session.read_rows(0, length)
    fast = verifier.generate(PROMPT, drafter=drafter, num_draft_tokens=3, **options)
    assert fast.token_ids == plain.token_ids
    assert fast.stats.drafted > 0
    np.testing.assert_array_equal(session.read_rows(0, length), expected)
    drafts = verifier._resources.draft_engines.open(Path(drafter.removeprefix("self:")), shares_cache=True)
    caches = drafts.loaded.session.caches
    assert [id(pair[0]) for pair in caches] == [id(session.caches[layer][0]) for layer in (0, 2)]


def test_sequences_that_alternate_on_a_draft_engine(verifier, tiny_engine):
    options = {"max_new_tokens": 30, "ignore_eos": True, "num_draft_tokens": 3, "drafter": f"model:{tiny_engine}"}
    prompts = (PROMPT, "another text")
    alone = [verifier.generate(prompt, **options).token_ids for prompt in prompts]
    streams = {prompt: verifier.stream(prompt, **options) for prompt in prompts}
    tokens = dict.fromkeys(prompts, ())
    while streams:
        for prompt in list(streams):
            event = next(streams[prompt], None)
            if event is None:
                del streams[prompt]
            else:
                tokens[prompt] += event.token_ids
    assert list(tokens.values()) == alone


def test_the_draft_does_not_depend_on_what_proposes_to_the_engine(tiny_engine, monkeypatch):
    loaded = load_engine(tiny_engine)
    context = np.tile(np.arange(20, 27), 6)
    expected = DraftEngine(loaded).draft(context, 12, None)
    assert len(expected) == 12
    passes = []
    honest = loaded.session.run_batch
    monkeypatch.setattr(
        loaded.session, "run_batch", lambda batch, **out: passes.append(len(batch[0].tokens)) or honest(batch, **out)
    )
    engine = DraftEngine(loaded)
    assert engine.draft(context, 12, None, PromptLookup()) == expected
    assert len(passes) <= 12
    # What was fed is not fed again, and a sequence that goes on elsewhere is followed from where they part.
    passes.clear()
    longer = np.concatenate([context, expected[:5], [3]])
    again = engine.draft(longer, 4, None)
    assert passes[0] == 1
    assert again == DraftEngine(loaded).draft(longer, 4, None)


def test_a_shorter_draft_engine_drafts_up_to_its_length(tiny_model, tiny_engine, build_engine, caplog):
    short = build_engine(tiny_model, max_length=64)
    options = {"max_new_tokens": 80, "ignore_eos": True}
    with runtime.load(tiny_engine) as engine:
        with caplog.at_level(logging.WARNING, "quasar.runtime"):
            fast = engine.generate(PROMPT, drafter=f"model:{short}", num_draft_tokens=4, **options)
        assert f"{short} holds 64 tokens, the verifier 512: it drafts up to there" in caplog.text
        assert fast.token_ids == engine.generate(PROMPT, drafter="none", **options).token_ids
    assert fast.stats.drafted > 0
    assert any(one.drafter == "" for one in fast.stats.drafts)


def test_vocabularies_that_differ_are_refused(tiny_engine, tmp_path):
    changed = shutil.copytree(tiny_engine, tmp_path / "other")
    words = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    by_id = {token: word for word, token in vocabulary.items()}
    vocabulary[by_id[40]], vocabulary[by_id[41]] = 41, 40
    (changed / "tokenizer.json").write_text(json.dumps(words))
    sign(changed)
    with runtime.load(tiny_engine) as engine, pytest.raises(GenerationError) as refused:
        engine.generate(PROMPT, drafter=f"model:{changed}")
    assert f"token 40 is {by_id[41]!r} there and {by_id[40]!r} here" in str(refused.value)


def test_a_tokenizer_written_in_another_way_is_the_same(tiny_engine, tmp_path):
    copied = shutil.copytree(tiny_engine, tmp_path / "other")
    tokenizer = copied / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=3))
    sign(copied)
    check_vocabularies(load_engine(tiny_engine).directory, load_engine(copied).directory)


def test_a_cache_that_may_not_be_shared_names_what_differs(verifier, tiny_engine, tiny_model, build_engine, tmp_path):
    with pytest.raises(GenerationError) as refused:
        verifier.generate(PROMPT, drafter=f"self:{tiny_engine}")
    assert str(refused.value) == (
        f"{tiny_engine} cannot draft on the verifier's cache; what differs: the smoothing of v_proj and o_proj. With a "
        f"cache of its own it can: model:{tiny_engine}"
    )
    whole, part = (build_engine(tiny_model, kv_dtype="int8", **options) for options in ({}, {"skip_layers": "1"}))
    with runtime.load(whole) as engine, pytest.raises(GenerationError, match="INT8 each engine has its own: there, 's"):
        engine.generate(PROMPT, drafter=f"self:{part}")
    other = build_engine(save_tiny_model(tmp_path / "other", "llama", num_key_value_heads=4, num_attention_heads=4))
    with pytest.raises(GenerationError, match="what differs: the checkpoint, num_kv_heads"):
        verifier.generate(PROMPT, drafter=f"self:{other}")


@pytest.mark.parametrize("name", ["model", "hierarchical"])
def test_engines_need_a_directory(verifier, name):
    with pytest.raises(GenerationError, match=f"as in {name}:DIR"):
        verifier.generate(PROMPT, drafter=name)


def test_a_smaller_engine_drafts_for_the_one_that_drafts(tiny_engine, unsmoothed, tmp_path):
    """ML-SpecQD's levels: the intermediate engine accepts a smaller one's tokens, and makes fewer passes."""
    # A directory's name may have a plus.
    middle = shutil.copytree(tiny_engine, tmp_path / "w8+a8")
    passes = {}
    for name, drafter in (("alone", f"model:{middle}"), ("levels", f"hierarchical:{middle}+{unsmoothed}")):
        with runtime.load(tiny_engine) as engine:
            drafted = engine.generate(
                "q w e r t", max_new_tokens=8, drafter=drafter, num_draft_tokens=4, ignore_eos=True
            )
            session = engine._resources.draft_engines.open(middle, shares_cache=False).loaded.session
            honest, counted = session.run_batch, []
            session.run_batch = lambda batch, counted=counted, honest=honest, **out: (
                counted.append(len(batch[0].tokens)) or honest(batch, **out)
            )
            again = engine.generate(
                "q w e r t", max_new_tokens=30, drafter=drafter, num_draft_tokens=4, ignore_eos=True
            )
            assert again.token_ids[:8] == drafted.token_ids
            passes[name] = len(counted)
    assert passes["levels"] < 0.8 * passes["alone"]


@pytest.mark.parametrize("argument", ["+", "{0}+", "+{0}", "{0}+nowhere", "nowhere+{0}"])
def test_every_level_needs_an_engine(verifier, tiny_engine, argument):
    with pytest.raises((GenerationError, EngineError), match=r"needs an engine directory after a colon|nowhere"):
        verifier.generate(PROMPT, drafter=f"hierarchical:{argument.format(tiny_engine)}")


@needs_library
@pytest.mark.parametrize("length", [5, 60, 300])
def test_trees_of_recycled_tokens_change_no_draft(tiny_engine, length):
    """What an engine drafts is its own continuation, whatever was proposed to it, and so is what it has cached."""
    context = np.random.default_rng(length).integers(3, 60, length)
    alone = DraftEngine(load_engine(tiny_engine))
    expected = alone.draft(context, 24, None)
    rest = np.concatenate([context, expected])
    further = alone.draft(rest, 12, None)

    engine = DraftEngine(load_engine(tiny_engine))
    assert engine.takes_trees
    told = {
        int(token): [int(after), (int(after) + 1) % 60] for token, after in itertools.pairwise(rest) if int(token) % 3
    }
    passes = []
    run = engine._verifier.run

    def counting(segments):
        passes.extend(segments)
        return run(segments)

    engine._verifier.run = counting
    inner = Recycling(branches=3, warm=told)
    assert engine.draft(context, 24, None, inner) == expected
    trees = [one for one in passes if one.parents is not None]
    assert trees
    # Fewer passes than tokens: some of what was proposed was taken.
    assert len(passes) < 24
    assert engine.draft(rest, 12, None, inner) == further

    # Drawn tokens as well: a token's place in the sequence is what its draw depends on.
    def draw(logits, position):
        return int(np.argmax(logits + np.random.default_rng(position).gumbel(size=len(logits))))

    assert engine.draft(context, 24, draw, inner) == alone.draft(context, 24, draw)


def test_stock_kernels_take_no_tree_before_a_prompt(tiny_model, build_engine):
    """Their attention rotates the first tokens by their order: a tree waits until something is cached."""
    loaded = load_engine(build_engine(tiny_model, tree_mask=True), options=OnnxRuntimeOptions(kernels="stock"))
    engine, context = DraftEngine(loaded), np.arange(20, 27)
    assert engine.takes_trees
    inner = Recycling(branches=3, warm={token: [token + 1, token + 2] for token in range(60)})
    assert engine.draft(context, 6, None, inner) == DraftEngine(loaded).draft(context, 6, None)


def test_an_engine_that_drafts_keeps_no_positions_of_another_salt(float_engine, tiny_engine, monkeypatch):
    """How long a first draft takes would tell one user what another one asked."""
    known, found = DraftEngine._known, []
    monkeypatch.setattr(DraftEngine, "_known", lambda *arguments: found.append(known(*arguments)) or found[-1])
    with runtime.load(float_engine, max_sequences=1) as engine:

        def reused(salt):
            found.clear()
            options = {"max_new_tokens": 4, "ignore_eos": True, "drafter": f"model:{tiny_engine}"}
            engine.generate(PROMPT, cache_salt=salt, num_draft_tokens=2, **options)
            return found[0]

        assert [reused("alice"), reused("bob"), reused(None), reused(None), reused("alice")] == [0] * 5
        assert reused("alice") >= len(engine.encode(PROMPT)) - 1


def test_memory_counts_weights_and_own_caches(float_engine, tiny_engine, unsmoothed):
    with runtime.load(float_engine) as engine:
        assert engine.memory().drafters == 0
        engine.generate(PROMPT, max_new_tokens=4, drafter=f"self:{unsmoothed}")
        shared = engine.memory().drafters
        engine.generate(PROMPT, max_new_tokens=4, drafter=f"model:{tiny_engine}")
        assert shared > 0
        assert engine.memory().drafters - shared > engine.memory().cache


def test_drafters_draw_with_the_targets_randomness(tiny_engine):
    """The engine drafts for itself: with the target's own draws every draft is right."""
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 5, "num_draft_tokens": 4}
    with runtime.load(tiny_engine) as engine:
        drawn = engine.generate(PROMPT, drafter=f"model:{tiny_engine}", **options)
    assert drawn.stats.accepted == drawn.stats.drafted > 0


def test_drafting_stops_after_an_end_token(tiny_engine):
    engine = DraftEngine(load_engine(tiny_engine))
    context = np.arange(20, 40)
    free = engine.draft(context, 8, None)
    engine.end_ids = frozenset({free[3]})
    cut = free[: free.index(free[3]) + 1]
    assert engine.draft(context, 8, None) == cut
    assert EngineDrafter(engine, "name", 320).propose(context, 8).tokens.tolist() == cut


@pytest.mark.parametrize("length", [253, 254, 255, 256, 257, 258, 511, 512])
def test_prompts_that_fill_a_piece_leave_room_for_proposals(tiny_engine, length, monkeypatch):
    """A pass takes as many tokens as a piece of a prompt has, proposals included."""
    loaded = load_engine(tiny_engine)
    chunk = loaded.session.contract.prefill_chunk
    context = np.tile(np.arange(20, 27), 80)[: length * chunk // 256 - 8]
    widths = []
    honest = loaded.session.run_batch
    monkeypatch.setattr(
        loaded.session, "run_batch", lambda batch, **out: widths.append(len(batch[0].tokens)) or honest(batch, **out)
    )
    found = DraftEngine(loaded).draft(context, 5, None, PromptLookup())
    assert max(widths) <= chunk
    assert found == DraftEngine(load_engine(tiny_engine)).draft(context, 5, None)


def test_ids_that_one_of_the_two_lacks(tiny_engine):
    """Tables may be padded to different sizes."""
    engine = DraftEngine(load_engine(tiny_engine))
    drafter = EngineDrafter(engine, "name", 320)
    context = np.arange(20, 40)
    whole = drafter.propose(context, 6).tokens.tolist()
    assert len(whole) == 6
    largest = max(whole)
    cut = EngineDrafter(engine, "name", largest).propose(context, 6).tokens.tolist()
    assert cut == whole[: whole.index(largest)]
    assert drafter.seconds_per_token < math.inf
    assert len(drafter.propose(np.append(context, 320), 6).tokens) == 0
    assert drafter.seconds_per_token == math.inf


def test_threads_that_ask_at_once_load_it_once(tiny_engine, unsmoothed, monkeypatch):
    loads = []
    honest = draft_engine.load_opened
    monkeypatch.setattr(
        draft_engine, "load_opened", lambda *a, **k: loads.append(k["options"].threads) or honest(*a, **k)
    )
    with runtime.load(tiny_engine, threads=1) as engine:
        engines = engine._resources.draft_engines
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: engines.open(unsmoothed, shares_cache=False), range(4)))
        assert len({id(one) for one in found}) == 1
        # As many threads as the verifier was given.
        assert loads == [1]
        conversation = engine.session()
    with pytest.raises(GenerationError, match="closed"):
        engines.open(unsmoothed, shares_cache=False)
    with pytest.raises(GenerationError, match="closed"):
        conversation.generate(PROMPT, drafter=f"model:{unsmoothed}")
    assert engines.nbytes == 0


def test_nobody_else_waits_for_an_engine_that_loads(tiny_engine, unsmoothed, monkeypatch):
    honest, begun, may_go_on = draft_engine.load_opened, threading.Event(), threading.Event()

    def slow(*given, **named):
        begun.set()
        assert may_go_on.wait(60)
        return honest(*given, **named)

    monkeypatch.setattr(draft_engine, "load_opened", slow)
    engine = runtime.load(tiny_engine, threads=1)
    engines = engine._resources.draft_engines
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engines.open, unsmoothed, shares_cache=False)
        assert begun.wait(60)
        assert engine.memory().drafters == 0
        engine.close()
        may_go_on.set()
        # What was loaded for an engine that is closed by then is closed as well.
        with pytest.raises(GenerationError, match="closed"):
            asked.result()
    assert engines.nbytes == 0


def test_another_models_layers_are_named_as_another_model(verifier, build_engine, tmp_path):
    deeper = save_tiny_model(tmp_path / "deeper", "llama", num_hidden_layers=5)
    other = build_engine(deeper, precision="fp32", skip_layers="4")
    with pytest.raises(GenerationError, match="what differs: the checkpoint"):
        verifier.generate(PROMPT, drafter=f"self:{other}")


def test_a_verifier_without_some_layers_shares_with_nobody(tiny_model, float_engine, build_engine):
    short = build_engine(tiny_model, precision="fp32", skip_layers="1")
    with runtime.load(short) as engine, pytest.raises(GenerationError, match="the verifier lacks 1; it must have all"):
        engine.generate(PROMPT, drafter=f"self:{float_engine}")


def test_wrong_options_load_nothing(tiny_engine, unsmoothed, monkeypatch):
    def never(*args, **options):
        raise AssertionError

    monkeypatch.setattr(draft_engine, "load_opened", never)
    with runtime.load(tiny_engine) as engine:
        for prompt, options in ((PROMPT, {"num_draft_tokens": 40}), ([400], {}), ([7] * 600, {})):
            with pytest.raises(GenerationError):
                engine.generate(prompt, drafter=f"model:{unsmoothed}", **options)


def sign(directory):
    """Make the manifest fit files that were changed."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    for name, entry in raw["files"].items():
        entry.update(sha256=sha256_file(directory / name), bytes=(directory / name).stat().st_size)
    raw["hashes"]["engine"] = Manifest.from_json(raw).engine_hash
    path.write_text(json.dumps(raw))


def test_its_latency_is_corrected_by_its_own_passes(tiny_engine):
    """A build beside other work recorded four times what a pass takes."""
    loaded = load_engine(tiny_engine)
    slow = {256: {1: 4e3, 32: 5e3}}
    now = [0.0]
    engine = DraftEngine(
        dataclasses.replace(loaded, record=dataclasses.replace(loaded.record, cost_surface_ms=slow)),
        clock=lambda: now[0],
    )
    run = engine._verifier.run

    def taking_a_second(segments):
        now[0] += 1.0
        return run(segments)

    engine._verifier.run = taking_a_second
    engine.end_ids = frozenset()
    assert engine.seconds_per_token == 4.0
    context = np.arange(20)
    for _ in range(30):
        engine.draft(context, 8, None)
    # The recorded latency counts for eight passes of many.
    assert engine.seconds_per_token == pytest.approx(1.0, rel=0.2)
