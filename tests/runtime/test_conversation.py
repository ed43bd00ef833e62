"""Conversations keep their cached positions, and every answer is that of the whole conversation from an empty cache."""

import asyncio
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

import runtime
from quasar.errors import ContextLimitError, GenerationError
from tests.tiny import save_tiny_model

CHUNK, STEP = 256, 16


@pytest.fixture(scope="module")
def engine(build_engine, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("long") / "model", "llama", max_position_embeddings=2048)
    with runtime.load(build_engine(folder)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def one_slot(build_engine, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("one") / "model", "llama", max_position_embeddings=2048)
    with runtime.load(build_engine(folder), max_sequences=1) as loaded:
        yield loaded


def said(*texts):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


LONG = "ab cd " * 60


def in_common(engine, messages, others):
    """Positions of the common beginning of two conversations, in steps."""
    pairs = zip(engine.encode(messages)[:-1].tolist(), engine.encode(others).tolist(), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) // STEP * STEP


def test_turns_are_those_of_a_fresh_prefill(engine):
    messages, reused = [], 0
    with engine.session() as conversation:
        for turn in range(6):
            question = f"turn {turn} " + "one two " * 12
            messages.append({"role": "user", "content": question})
            answer = conversation.generate(question, max_new_tokens=40, temperature=1.0, seed=turn)
            fresh = engine.generate(messages, max_new_tokens=40, temperature=1.0, seed=turn, drafter="none")
            assert answer.token_ids == fresh.token_ids
            assert answer.stats.prompt_tokens == fresh.stats.prompt_tokens
            assert answer.stats.reused_tokens % STEP == 0
            reused += answer.stats.reused_tokens
            messages.append({"role": "assistant", "content": answer.text})
            assert list(conversation.messages) == messages
    assert reused >= 3 * CHUNK


def test_messages_and_token_ids_replace_what_was_there(engine):
    conversation = engine.session()
    conversation.generate(LONG, max_new_tokens=4)
    whole = said(LONG, "something else", "and so?")
    answer = conversation.generate(whole, max_new_tokens=8)
    assert answer.stats.reused_tokens == in_common(engine, whole, said(LONG))
    assert answer.token_ids == engine.generate(whole, max_new_tokens=8).token_ids
    assert conversation.messages == (*whole, {"role": "assistant", "content": answer.text})
    conversation.generate([1, 2, 3], max_new_tokens=3)
    assert conversation.messages == ()
    assert conversation.token_ids[:3].tolist() == [1, 2, 3]


def test_a_fork_goes_its_own_way(engine):
    base = engine.session([{"role": "system", "content": LONG}])
    assert base.prefill() == len(base.token_ids) > CHUNK
    forks = [base.fork() for _ in range(3)]
    for place, fork in enumerate(forks):
        answer = fork.generate(f"question {place}", max_new_tokens=12)
        messages = [{"role": "system", "content": LONG}, {"role": "user", "content": f"question {place}"}]
        assert answer.stats.reused_tokens == in_common(engine, messages, messages[:1])
        assert answer.token_ids == engine.generate(messages, max_new_tokens=12).token_ids
    assert base.messages == ({"role": "system", "content": LONG},)
    again = base.generate("question 1", max_new_tokens=12)
    assert again.token_ids == tuple(forks[1].fork().generate([*base.messages[:2]], max_new_tokens=12).token_ids)


def test_truncate_forgets_positions_and_the_turns_that_are_not_whole(engine):
    conversation = engine.session()
    conversation.generate("first", max_new_tokens=6, ignore_eos=True)
    kept, messages = len(conversation.token_ids), conversation.messages
    conversation.generate(LONG, max_new_tokens=6, ignore_eos=True)
    conversation.truncate(kept + 3)
    assert conversation.messages == messages
    assert len(conversation.token_ids) == kept + 3
    answer = conversation.generate("second", max_new_tokens=6)
    whole = [*messages, {"role": "user", "content": "second"}]
    assert answer.token_ids == engine.generate(whole, max_new_tokens=6).token_ids
    conversation.truncate(0)
    assert conversation.messages == ()
    with pytest.raises(ContextLimitError, match="holds 0 tokens and cannot be cut to 1"):
        conversation.truncate(1)
    begun = engine.session([{"role": "system", "content": "be brief"}])
    begun.generate("first", max_new_tokens=6)
    begun.truncate(0)
    assert begun.messages == ({"role": "system", "content": "be brief"},)


def test_closed_in_the_middle_of_a_stream(engine):
    conversation = engine.session()
    stream = conversation.stream("hello", max_new_tokens=50, ignore_eos=True)
    next(stream)
    conversation.close()
    with pytest.raises(GenerationError, match="this conversation is closed"):
        list(stream)


def test_nothing_else_happens_to_a_sequence_that_is_generating(engine):
    conversation = engine.session()
    seen = []

    def hook(context, logits):
        for use in (conversation.fork, lambda: conversation.prefill("x"), lambda: conversation.truncate(0)):
            with pytest.raises(GenerationError, match="this conversation is generating already"):
                use()
            seen.append(use)
        return logits

    with pytest.raises(GenerationError, match="the prompt is empty"):
        conversation.prefill()
    conversation.prefill("hello")
    conversation.generate("hello", max_new_tokens=1, logits_processor=hook)
    assert len(seen) == 3


def test_a_closed_stream_leaves_the_answer_so_far(engine):
    conversation = engine.session()
    stream = conversation.stream("hello", max_new_tokens=50, ignore_eos=True, drafter="none")
    text = "".join(next(stream).text for _ in range(10))
    with pytest.raises(GenerationError, match="this conversation is generating already"):
        conversation.generate("again")
    with pytest.raises(GenerationError, match="this conversation is generating already"):
        conversation.fork()
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    answer = conversation.generate("go on", max_new_tokens=8)
    assert answer.token_ids == engine.generate([*conversation.messages[:-1]], max_new_tokens=8).token_ids


def test_a_turn_that_gave_nothing_changes_no_messages(engine):
    cancel = threading.Event()
    cancel.set()
    conversation = engine.session()
    conversation.generate("hello", max_new_tokens=6, ignore_eos=True)
    before, length = conversation.messages, len(conversation.token_ids)
    assert conversation.generate("and?", cancel=cancel).finish_reason == "cancelled"
    assert conversation.messages == before
    assert len(conversation.token_ids) == length
    conversation.truncate(0)
    assert conversation.messages == ()


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_cached_positions_do_not_depend_on_the_drafter(engine, drafter):
    """A sequence that ends inside a block of accepted drafts keeps the positions of its tokens, and no more."""
    free = engine.generate("ab ab ab ab ab", max_new_tokens=60, ignore_eos=True)
    conversation = engine.session()
    stop = free.token_ids[20]
    answer = conversation.generate(
        "ab ab ab ab ab",
        max_new_tokens=60,
        ignore_eos=True,
        stop_token_ids=[stop],
        drafter=drafter,
        num_draft_tokens=16,
    )
    assert len(conversation.token_ids) == answer.stats.prompt_tokens + answer.stats.tokens - 1


def test_a_string_is_prefilled_as_the_next_message(engine):
    conversation = engine.session([{"role": "system", "content": LONG}])
    conversation.prefill()
    kept = len(conversation.token_ids)
    assert conversation.prefill("hello") > kept
    answer = conversation.generate("hello", max_new_tokens=4)
    assert answer.stats.reused_tokens > CHUNK


def test_asyncio(engine):
    async def main():
        conversation = engine.session()
        first = await conversation.agenerate("hello", max_new_tokens=5)
        pieces = [event.text async for event in conversation.astream("and?", max_new_tokens=5)]
        return first.text, "".join(pieces), conversation.messages

    first, second, messages = asyncio.run(main())
    assert [message["content"] for message in messages] == ["hello", first, "and?", second]


def test_a_prompt_that_does_not_fit_changes_nothing(engine):
    conversation = engine.session()
    conversation.generate("hello", max_new_tokens=4)
    before = conversation.messages, conversation.token_ids.tolist()
    with pytest.raises(ContextLimitError, match="this engine holds 2048"):
        conversation.generate("word " * 800)
    with pytest.raises(GenerationError, match="top_p is 2"):
        conversation.generate("hello", top_p=2)
    assert (conversation.messages, conversation.token_ids.tolist()) == before


def test_conversations_share_an_engine(one_slot):
    """Their turns alternate: each keeps its own positions, which are swapped out in between."""
    engine = one_slot
    conversations = [engine.session() for _ in range(3)]
    histories = [[], [], []]
    for turn in range(3):
        for place, conversation in enumerate(conversations):
            question = f"{place} asks {turn} " + "x y " * 40
            histories[place].append({"role": "user", "content": question})
            answer = conversation.generate(question, max_new_tokens=10)
            assert answer.token_ids == engine.generate(histories[place], max_new_tokens=10).token_ids
            histories[place].append({"role": "assistant", "content": answer.text})
    assert engine.memory().swapped_out > 0
    for conversation in conversations:
        conversation.close()
    assert engine.memory().swapped_out == 0
    with pytest.raises(GenerationError, match="this conversation is closed"):
        conversations[0].generate("hello")


def test_where_decoded_positions_are_not_exact_only_prefilled_ones_serve(build_engine, tmp_path, monkeypatch):
    """Head size 256 on stock kernels: attention sums in another order at some totals on some CPUs."""
    folder = save_tiny_model(
        tmp_path / "model", "qwen3", head_dim=256, num_hidden_layers=2, max_position_embeddings=1024
    )
    with runtime.load(build_engine(folder), kernels="stock") as engine, engine.session() as conversation:
        inexact = replace(engine.record.row_invariance, prefill=False)
        record = replace(engine.record, row_invariance=inexact)
        monkeypatch.setattr(engine._resources, "loaded", replace(engine._loaded, record=record))
        messages = []
        for turn, reused in enumerate([0, 0, CHUNK]):
            question = f"turn {turn} " + "ab " * (20 if turn == 0 else 90)
            messages.append({"role": "user", "content": question})
            answer = conversation.generate(question, max_new_tokens=50, ignore_eos=True)
            assert answer.stats.reused_tokens == reused
            assert answer.token_ids == engine.generate(messages, max_new_tokens=50, ignore_eos=True).token_ids
            messages.append({"role": "assistant", "content": answer.text})


def test_prefill_needs_something(engine):
    with pytest.raises(GenerationError, match="the prompt is empty"):
        engine.session().prefill()
    assert engine.session().prefill("hello") == len(engine.encode("hello"))
    assert engine.session().prefill(np.arange(5)) == 5


def test_a_salt_is_that_of_the_generation_that_runs(engine):
    """Not of a stream that was made and never read; and what was said without a salt serves nobody."""
    ids = list(range(1, 70))
    with engine.session() as conversation:
        first = conversation.stream(ids, max_new_tokens=2, cache_salt="mine", ignore_eos=True)
        conversation.stream(ids, max_new_tokens=2, cache_salt="other's")
        list(first)
        options = {"max_new_tokens": 1, "ignore_eos": True}
        assert engine.generate([*ids, 5], cache_salt="other's", **options).stats.reused_tokens == 0
        assert engine.generate([*ids, 5], cache_salt="mine", **options).stats.reused_tokens == 64
    with engine.session() as conversation:
        private = list(range(101, 170))
        conversation.generate(private, max_new_tokens=2, ignore_eos=True)
        second = conversation.stream([7] * 40, max_new_tokens=20, cache_salt="new", ignore_eos=True, priority=1)
        # Asked before the conversation's own first pass.
        cancelled = conversation._scheduled
        assert cancelled.salt is None
        next(second)
        assert engine.generate([*private, 5], cache_salt="new", **options).stats.reused_tokens == 0
        second.close()


def test_a_stream_that_another_answer_overtook_is_refused(engine):
    """It was rendered without that answer, and would drop it."""
    with engine.session() as conversation:
        first, second = (conversation.stream(text, max_new_tokens=3, ignore_eos=True) for text in ("one", "two"))
        assert list(first)
        kept = conversation.messages
        with pytest.raises(GenerationError, match="the conversation went on after this stream was made"):
            list(second)
        assert conversation.messages == kept
        assert conversation.generate("two", max_new_tokens=3, ignore_eos=True).stats.tokens == 3
        assert [one["content"] for one in conversation.messages[::2]] == ["one", "two"]


@pytest.mark.parametrize("length", [2.5, "2", None, True])
def test_a_length_that_is_no_number_of_tokens(engine, length):
    with engine.session() as conversation:
        conversation.generate("one", max_new_tokens=3, ignore_eos=True)
        with pytest.raises(ContextLimitError, match=r"length is .*; a whole number of tokens was expected"):
            conversation.truncate(length)
        assert conversation.generate("two", max_new_tokens=3, ignore_eos=True).stats.tokens == 3
