"""The API on a tiny engine: load, generate, stream; speculation changes nothing but the number of passes."""

import numpy as np
import pytest

import runtime
from engines.onnxruntime.session import OnnxRuntimeSession
from quasar.errors import ContextLimitError, EngineError, FaultError, GenerationError, PromptError
from runtime import resources
from runtime.drafters import Draft, PromptLookup
from runtime.drafters.base import NO_DRAFT
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

PROMPT = "one two three one two three one two"


@pytest.fixture(scope="module")
def engine(tiny_engine):
    with runtime.load(tiny_engine) as loaded:
        yield loaded


class Random:
    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)

    def propose(self, context, max_tokens):
        return Draft(tokens=self.random.integers(0, 320, max_tokens))


@pytest.mark.parametrize("drafter", ["prompt-lookup", PromptLookup(match="earliest"), Random()])
@pytest.mark.parametrize("k", [1, 5, 16, 31])
def test_speculation_gives_the_tokens_of_plain_decoding(engine, drafter, k):
    plain = engine.generate(PROMPT, max_new_tokens=60, drafter="none", ignore_eos=True)
    fast = engine.generate(PROMPT, max_new_tokens=60, drafter=drafter, num_draft_tokens=k, ignore_eos=True)
    assert fast.token_ids == plain.token_ids
    assert fast.text == plain.text
    assert plain.stats.rounds == 59
    assert plain.stats.acceptance_length == 1
    assert fast.stats.drafted > 0


def check_boundaries(exact, session):
    """Plain passes against wide ones at every length, on the whole graph: bits differ across the record's totals alone.

    Rounding of activations hides half of the differences, so every total is looked at from seven lengths with three
    token sets. On one CPU each of those sets showed each boundary with a chance of 23 of 24.
    """
    found = set()
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(0, 320, 480)
        for length in range(1, 460):
            # The plain pass comes last, so that positions before the next length are those of plain passes.
            wide = {
                width: session.run_logits(tokens[length : length + width], length, width)[0].copy()
                for width in (2, 4, 8)
            }
            plain = session.run_logits(tokens[length : length + 1], length, 1)[0]
            for width, row in wide.items():
                crossed = [total for total in exact.boundaries if length + 1 < total <= length + width]
                assert (width - 1 > exact.drafts_before_boundary(length)) == bool(crossed)
                if not np.array_equal(row.view(np.uint32), plain.view(np.uint32)):
                    assert crossed, f"{width} tokens after {length} differ from plain decoding"
                    found.update(crossed)
    # Passes after fewer than 453 positions are those that all seven lengths reach.
    assert found >= {total for total in exact.boundaries if total < 454}


@pytest.mark.parametrize("kernels", ["stock", pytest.param("native", marks=needs_library)])
def test_head_size_256_is_exact_across_64_positions(tmp_path, build_engine, kernels):
    """Spare positions keep every stock pass above 64 in total; no pass reaches over the boundaries that were found."""
    folder = save_tiny_model(tmp_path / "model", "qwen3", head_dim=256, num_hidden_layers=2)
    random = np.random.default_rng(6)
    with runtime.load(build_engine(folder), kernels=kernels) as engine:
        assert engine.plain_width == 1
        # Where stock attention sums in another order depends on the CPU; native kernels do not.
        boundaries = engine.record.row_invariance.boundaries
        assert boundaries == () or kernels == "stock"
        check_boundaries(engine.record.row_invariance, engine._resources.loaded.session)
        assert engine.record.row_invariance.widest == 32
        drafted = 0
        for length in [
            3,
            5,
            20,
            40,
            50,
            55,
            58,
            60,
            61,
            62,
            63,
            64,
            65,
            70,
            100,
            160,
            170,
            180,
            200,
            255,
            256,
            257,
            400,
        ]:
            # Repeats, so that prompt lookup drafts.
            prompt = np.tile(random.integers(0, 250, 9), 60)[:length]
            plain = engine.generate(prompt, max_new_tokens=24, drafter="none", ignore_eos=True)
            for drafter, k in (("prompt-lookup", 5), (Random(length), 31)):
                fast = engine.generate(prompt, max_new_tokens=24, drafter=drafter, num_draft_tokens=k, ignore_eos=True)
                assert fast.token_ids == plain.token_ids, length
                drafted += fast.stats.drafted
        assert drafted > 1000


def test_generate_is_a_loop_over_stream(engine):
    events = list(engine.stream(PROMPT, max_new_tokens=20))
    whole = engine.generate(PROMPT, max_new_tokens=20)
    assert "".join(event.text for event in events) == whole.text
    assert tuple(token for event in events for token in event.token_ids) == whole.token_ids
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == whole.finish_reason
    assert events[-1].stats.tokens == len(whole.token_ids) == whole.stats.tokens
    assert whole.stats.rounds == len(events) - 1
    assert whole.stopped_by == events[-1].stopped_by


def test_three_forms_of_a_prompt(engine):
    text = engine.generate("hello", max_new_tokens=8)
    messages = engine.generate([{"role": "user", "content": "hello"}], max_new_tokens=8)
    ids = engine.generate(engine.encode("hello"), max_new_tokens=8)
    as_list = engine.generate(engine.encode("hello").tolist(), max_new_tokens=8)
    assert text.token_ids == messages.token_ids == ids.token_ids == as_list.token_ids
    assert engine.encode("hello", chat_template=False).tolist() != engine.encode("hello").tolist()


@pytest.mark.parametrize("prompt", [np.array([1.7]), np.array([[1, 2]]), [2**70], [2**64 - 1], np.array([True])])
def test_prompts_that_are_no_token_ids(engine, prompt):
    with pytest.raises(GenerationError, match="the prompt "):
        engine.generate(prompt)


def test_end_token_stops_and_is_counted(engine):
    free = engine.generate(PROMPT, max_new_tokens=200, ignore_eos=True)
    assert free.finish_reason == "length"
    stops = engine.manifest.text.eos_token_ids
    stopped = engine.generate(PROMPT, max_new_tokens=200)
    if any(token in stops for token in free.token_ids):
        end = next(place for place, token in enumerate(free.token_ids) if token in stops)
        assert stopped.token_ids == free.token_ids[: end + 1]
        assert stopped.finish_reason == "stop"
    else:
        assert stopped.token_ids == free.token_ids


def test_context_limit_ends_the_text_or_refuses_the_prompt(engine):
    limit = engine.manifest.contract.max_length
    prompt = np.arange(limit - 10) % 250
    for drafter in ("none", "prompt-lookup", Random()):
        generation = engine.generate(prompt, max_new_tokens=50, drafter=drafter, ignore_eos=True)
        assert len(generation.token_ids) == 10
        assert generation.finish_reason == "length"
    with pytest.raises(ContextLimitError, match=f"has {limit} tokens and this engine holds {limit}"):
        engine.generate(np.arange(limit) % 250)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "magic"}, "unknown drafter 'magic'; known are auto, none, prompt-lookup, suffix, recycling"),
        ({"drafter": "sufix"}, "did you mean 'suffix'"),
        ({"drafter": "none,suffix"}, "drafter 'none' stands beside others; it goes alone"),
        ({"drafter": []}, "drafter is an empty list"),
        ({"drafter": ["suffix", 3]}, "drafter is 3; a name, or an object with propose, was expected"),
        ({"drafter": "suffix:4"}, "'suffix' takes nothing after a colon"),
        ({"drafter": "prompt-lookup:3"}, "as in prompt-lookup:1-3"),
        ({"drafter": "prompt-lookup:3-2"}, "min_ngram is 3, max_ngram 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; 1 or more was expected"),
        (
            {"num_draft_tokens": 32, "drafter": "prompt-lookup"},
            "num_draft_tokens is 32; on this machine 0 to 31 drafts are verified exactly",
        ),
        ({"num_draft_tokens": -1}, "num_draft_tokens is -1"),
    ],
)
def test_options_that_cannot_be_honoured(engine, options, message):
    with pytest.raises(GenerationError, match=message):
        engine.generate("hello", **options)


def test_options_nobody_knows_are_an_error(engine):
    with pytest.raises(GenerationError, match="unknown option 'temprature'; did you mean 'temperature'"):
        engine.generate("hello", temprature=1)
    with pytest.raises(GenerationError, match="unknown option 'beams'; known are max_new_tokens, min_new_tokens, "):
        engine.generate("hello", beams=4)


def test_messages_are_checked(engine):
    with pytest.raises(PromptError, match="a message needs the strings role and content"):
        engine.generate([{"role": "user"}])
    with pytest.raises(GenerationError, match="messages need the chat template"):
        engine.generate([{"role": "user", "content": "hi"}], chat_template=False)


def test_logits_do_not_disturb_a_stream(engine):
    expected = engine.generate(PROMPT, max_new_tokens=20).token_ids
    stream = engine.stream(PROMPT, max_new_tokens=20)
    tokens = list(next(stream).token_ids)
    for event in stream:
        tokens += event.token_ids
        engine.logits([1, 2, 3])
    assert tuple(tokens) == expected
    after = engine.generate([1, 2, 3], max_new_tokens=1).token_ids
    assert engine.logits([1, 2, 3]).argmax() == after[0]
    with pytest.raises(GenerationError, match="the prompt is empty"):
        engine.logits([])
    with pytest.raises(GenerationError, match="outside the vocabulary"):
        engine.logits([320])


def test_closed_engine(tiny_engine):
    engine = runtime.load(tiny_engine)
    engine.close()
    with pytest.raises(GenerationError, match="this engine is closed"):
        engine.generate("hello")


def test_speculation_is_refused_where_positions_are_not_exact(tiny_engine, monkeypatch):
    from dataclasses import replace

    from engines.probes.row_invariance import RowInvariance

    engine = runtime.load(tiny_engine)
    inexact = replace(engine.record, row_invariance=RowInvariance(chain=None, widest=1))
    monkeypatch.setattr(engine._resources, "loaded", replace(engine._loaded, record=inexact))
    with pytest.raises(GenerationError, match="use drafter='none'"):
        engine.generate("hello", drafter="suffix")
    # The default does what is exact.
    assert engine.generate("hello hello hello", max_new_tokens=3).stats.drafted == 0
    assert engine.generate("hello", drafter="none", max_new_tokens=3).stats.tokens == 3


def test_a_wider_plain_pass_gives_the_same_answer(tiny_engine, monkeypatch):
    from dataclasses import replace

    from engines.probes.row_invariance import RowInvariance

    engine = runtime.load(tiny_engine)
    expected = engine.generate(PROMPT, max_new_tokens=30).token_ids
    wider = replace(engine.record, row_invariance=RowInvariance(chain=4, widest=32))
    monkeypatch.setattr(engine._resources, "loaded", replace(engine._loaded, record=wider))
    assert engine.plain_width == 4
    assert engine.generate(PROMPT, max_new_tokens=30, drafter="none").token_ids == expected


def test_threads_must_make_sense(tiny_engine):
    with pytest.raises(EngineError, match="threads is -1"):
        runtime.load(tiny_engine, threads=-1)


def test_a_drafter_cannot_write_to_its_context(engine):
    class Sorts:
        def propose(self, context, max_tokens):
            context[-8:].sort()
            return NO_DRAFT

    expected = engine.generate(PROMPT, max_new_tokens=8, drafter="none").token_ids
    with pytest.raises(ValueError, match="read-only"):
        engine.generate(PROMPT, max_new_tokens=8, drafter=Sorts())
    assert engine.generate(PROMPT, max_new_tokens=8).token_ids == expected


@pytest.mark.parametrize("prior", [float("nan"), float("inf"), 1.5, -0.1])
def test_a_prior_that_is_no_probability_fails_its_own_request(engine, prior):
    class Boasts:
        def propose(self, context, max_tokens):
            return Draft(tokens=context[:1])

        def prior(self, evidence):
            return prior

    with pytest.raises(FaultError, match=r"drafter '.*Boasts.*' gives its guesses the prior .*; 0 to 1 was expected"):
        engine.generate(PROMPT, max_new_tokens=8, drafter=[Boasts(), "suffix"])
    assert engine.generate(PROMPT, max_new_tokens=8).stats.tokens == 8


def test_a_close_that_is_refused_leaves_the_engine_open(tiny_engine):
    engine, refused = runtime.load(tiny_engine), []

    class Closes:
        def propose(self, context, max_tokens):
            with pytest.raises(GenerationError, match="used the engine that is calling it") as raised:
                engine.close()
            refused.append(raised)
            return NO_DRAFT

    for _ in range(2):
        assert engine.generate(PROMPT, max_new_tokens=4, drafter=Closes()).stats.tokens == 4
    assert refused
    engine.close()
    engine.close()
    with pytest.raises(GenerationError, match="this engine is closed"):
        engine.generate(PROMPT)


def test_a_load_that_fails_late_frees_the_session(tiny_engine, monkeypatch):
    closed = []
    monkeypatch.setattr(OnnxRuntimeSession, "close", lambda session: closed.append(session))

    def fail(path, text):
        # What the probes opened is not meant.
        closed.clear()
        raise ZeroDivisionError

    monkeypatch.setattr(resources, "open_codec", fail)
    with pytest.raises(ZeroDivisionError):
        runtime.load(tiny_engine)
    assert len(closed) == 1
