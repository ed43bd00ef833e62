"""What services do with an engine: threads, open streams, cancelling, deadlines, asyncio, hooks, logs, memory."""

import asyncio
import itertools
import logging
import resource
import threading
import time

import numpy as np
import pytest

import runtime
from engines.onnxruntime.session import external_bytes
from quasar.errors import GenerationError, QueueFullError
from runtime import composition
from runtime.prompt_ids import encode_prompt
from tests.plugins.cpu.operators import needs_library

PROMPTS = ["one two one two", "abc abc abc", "hello there", "x y z x y"]


@pytest.fixture(scope="module")
def engine(tiny_engine):
    with runtime.load(tiny_engine) as loaded:
        yield loaded


def test_threads_get_the_answers_that_they_would_get_alone(engine):
    requests = [
        (thread, {"prompt": PROMPTS[(thread + turn) % 4], "temperature": turn % 2, "seed": 10 * thread + turn})
        for thread in range(8)
        for turn in range(25)
    ]

    def run(request):
        return engine.generate(**request, max_new_tokens=12).token_ids

    alone = [run(request) for _, request in requests]
    together: dict[int, list] = {}

    def serve(thread):
        together[thread] = [run(request) for of, request in requests if of == thread]

    threads = [threading.Thread(target=serve, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [tokens for thread in range(8) for tokens in together[thread]] == alone


def test_open_streams_alternate(engine):
    """Any number in one thread: none waits for another to be finished."""
    options = {"max_new_tokens": 30, "ignore_eos": True, "drafter": "none"}
    alone = [engine.generate(prompt, **options).token_ids for prompt in PROMPTS]
    streams = [engine.stream(prompt, **options) for prompt in PROMPTS]
    answers = [[] for _ in streams]
    for turn in range(6):
        for answer, stream in zip(answers, streams, strict=True):
            for _ in range(turn + 1):
                answer += next(stream).token_ids
    assert engine.generate(PROMPTS[0], **options).token_ids == alone[0]
    for answer, stream in zip(answers, streams, strict=True):
        for event in stream:
            answer += event.token_ids
    assert [tuple(answer) for answer in answers] == alone
    assert engine.memory().swapped_out == 0


@needs_library
@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "int8-tiers"])
def test_small_caches_are_shared_swapped_and_copied(tiny_model, shared_engine, kv_dtype):
    """More streams than slots, which take turns: every slot's rows go out and come back, and prefixes are copied."""
    directory = shared_engine(tiny_model, kv_dtype=kv_dtype)
    opening = "one two three one two three " * 4
    requests = [
        {"prompt": opening + PROMPTS[place % 4], "temperature": float(place % 2), "seed": place} for place in range(6)
    ]
    options = {"max_new_tokens": 24, "ignore_eos": True}
    with runtime.load(directory, max_sequences=1) as engine:
        alone = [engine.generate(**one, **options, drafter="none").token_ids for one in requests]
    swapped_out = 0
    with runtime.load(directory, max_sequences=2) as engine:
        assert engine.record.row_invariance.batch
        streams = [engine.stream(**one, **options, cache_salt="all") for one in requests]
        events = [[] for _ in streams]
        while not all(heard and heard[-1].finish_reason for heard in events):
            for heard, stream in zip(events, streams, strict=True):
                heard += itertools.islice(stream, 1)
                swapped_out = max(swapped_out, engine.memory().swapped_out)
    assert [tuple(token for event in heard for token in event.token_ids) for heard in events] == alone
    assert swapped_out > 0
    assert max(heard[-1].stats.reused_tokens for heard in events) > len(opening) // 2


def test_an_abandoned_stream_frees_its_positions(tiny_engine):
    with runtime.load(tiny_engine, max_sequences=1) as engine:
        stream = engine.stream("hello", max_new_tokens=20)
        next(stream)
        engine.generate("hello", max_new_tokens=4)
        assert engine.memory().swapped_out > 0
        stream.close()
        assert engine.memory().swapped_out == 0


class TestCancel:
    def test_from_another_thread_within_one_round(self, engine):
        cancel = threading.Event()
        rounds_after = 0
        for event in engine.stream("hello", max_new_tokens=400, ignore_eos=True, drafter="none", cancel=cancel):
            if cancel.is_set():
                rounds_after += 1
            if event.finish_reason is None and len(event.token_ids) and not cancel.is_set():
                setter = threading.Thread(target=cancel.set)
                setter.start()
                setter.join()
        assert event.finish_reason == "cancelled"
        assert (event.token_ids, rounds_after) == ((), 1)
        assert event.stats.finish_reason == "cancelled"
        assert event.stats.tokens == 1
        # The engine is as good as before.
        assert engine.generate("hello", max_new_tokens=4).stats.tokens == 4

    def test_before_it_began(self, engine):
        cancel = threading.Event()
        cancel.set()
        generation = engine.generate("hello", cancel=cancel)
        assert (generation.finish_reason, generation.token_ids, generation.text) == ("cancelled", (), "")
        assert (generation.stats.tokens, generation.stats.rounds) == (0, 0)

    def test_while_another_sequence_has_the_engine(self, engine):
        cancel = threading.Event()
        entered, leave = threading.Event(), threading.Event()

        def hold(context, logits):
            entered.set()
            leave.wait(30)
            return logits

        holder = threading.Thread(target=lambda: engine.generate("hello", max_new_tokens=1, logits_processor=hold))
        holder.start()
        entered.wait(30)
        found = []
        waiting = threading.Thread(target=lambda: found.append(engine.generate("hello", cancel=cancel)))
        waiting.start()
        cancel.set()
        waiting.join(30)
        leave.set()
        holder.join()
        assert found[0].finish_reason == "cancelled"
        assert found[0].stats.wait_seconds > 0

    def test_a_long_prompt_stops_between_its_chunks(self, engine):
        calls = []

        class Later:
            def is_set(self):
                calls.append(1)
                return len(calls) > 1

        generation = engine.generate(np.arange(500) % 250, cancel=Later())
        assert (generation.finish_reason, generation.token_ids) == ("cancelled", ())

    def test_deadline(self, engine):
        start = time.monotonic()
        generation = engine.generate(
            "hello", max_new_tokens=10**6, ignore_eos=True, deadline=0.05, drafter="none", logits_processor=slowly
        )
        assert generation.finish_reason == "deadline"
        assert 1 < len(generation.token_ids) < 100
        assert time.monotonic() - start < 10


def slowly(context, logits):
    time.sleep(0.01)
    return logits


class TestAsync:
    def test_the_same_answers_side_by_side(self, engine):
        async def main():
            many = await asyncio.gather(
                *(engine.agenerate(prompt, max_new_tokens=12, temperature=1, seed=3) for prompt in PROMPTS)
            )
            pieces = [event.text async for event in engine.astream(PROMPTS[0], max_new_tokens=12)]
            return many, "".join(pieces)

        many, text = asyncio.run(main())
        expected = [engine.generate(prompt, max_new_tokens=12, temperature=1, seed=3) for prompt in PROMPTS]
        assert [one.token_ids for one in many] == [one.token_ids for one in expected]
        assert text == engine.generate(PROMPTS[0], max_new_tokens=12).text

    def test_a_prompt_becomes_tokens_in_the_streams_own_thread(self, engine, monkeypatch):
        threads = []

        def encode(*given):
            threads.append(threading.current_thread())
            return encode_prompt(*given)

        monkeypatch.setattr("runtime.api.encode_prompt", encode)
        asyncio.run(engine.agenerate(PROMPTS[0], max_new_tokens=2))
        assert threads
        assert threading.main_thread() not in threads

    def test_a_consumer_that_leaves_cancels(self, engine):
        finished = []

        async def main():
            stream = engine.astream("hello", max_new_tokens=10**6, ignore_eos=True, logits_processor=slowly)
            async for _ in stream:
                break
            await stream.aclose()
            for _ in range(500):
                if not [one for one in threading.enumerate() if one.name == "quasar-stream"]:
                    finished.append(True)
                    return
                await asyncio.sleep(0.01)

        asyncio.run(main())
        assert finished

    def test_a_reader_that_pauses_is_not_run_ahead_of(self, engine):
        rounds = []

        def counted(context, logits):
            rounds.append(1)
            return logits

        async def main():
            stream = engine.astream(
                "hello", max_new_tokens=400, ignore_eos=True, drafter="none", logits_processor=counted
            )
            await anext(stream)
            await asyncio.sleep(0.5)
            made = len(rounds)
            # Others have the engine meanwhile.
            assert (await engine.agenerate("hello", max_new_tokens=3)).stats.tokens <= 3
            await stream.aclose()
            return made

        assert asyncio.run(main()) <= 12

    def test_cancelling_the_task(self, engine):
        async def main():
            task = asyncio.create_task(
                engine.agenerate("hello", max_new_tokens=10**6, ignore_eos=True, logits_processor=slowly)
            )
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert engine.generate("hello", max_new_tokens=4).stats.tokens == 4

    def test_errors_arrive_where_they_are_awaited(self, engine):
        async def main():
            with pytest.raises(GenerationError, match="top_p is 7"):
                await engine.agenerate("hello", top_p=7)
            with pytest.raises(GenerationError, match="logits_processor returned NoneType"):
                await engine.agenerate("hello", logits_processor=lambda context, logits: None)

        asyncio.run(main())

    def test_a_signal_of_ones_own(self, engine):
        cancel = threading.Event()
        cancel.set()
        assert asyncio.run(engine.agenerate("hello", cancel=cancel)).finish_reason == "cancelled"


def test_a_list_of_prompts(engine):
    many = engine.generate(PROMPTS, max_new_tokens=6)
    assert [one.token_ids for one in many] == [engine.generate(one, max_new_tokens=6).token_ids for one in PROMPTS]
    messages = [[{"role": "user", "content": one}] for one in PROMPTS[:2]]
    assert [one.text for one in engine.generate(messages, max_new_tokens=6)] == [one.text for one in many[:2]]
    assert len(engine.generate([[1, 2], [3]], max_new_tokens=2)) == 2
    assert engine.generate([1, 2, 3], max_new_tokens=2).stats.prompt_tokens == 3


def test_a_list_goes_one_by_one_where_passes_are_not_shared(tiny_engine, monkeypatch):
    """Side by side they would take the only slot from each other at every turn."""
    monkeypatch.setattr(composition, "PATIENCE", 0.0)
    swapped_out = []

    def hear(step):
        swapped_out.append(engine.metrics().swapped_out)

    with runtime.load(tiny_engine, max_sequences=1, on_round=hear) as engine:
        alone = [engine.generate(prompt, max_new_tokens=8).token_ids for prompt in PROMPTS]
        assert [one.token_ids for one in engine.generate(PROMPTS, max_new_tokens=8)] == alone
    assert len(swapped_out) > len(PROMPTS)
    assert not any(swapped_out)


def test_a_list_that_the_queue_has_no_room_for_begins_as_its_own_answers_end(tiny_engine):
    options = {"max_new_tokens": 8, "ignore_eos": True}
    with runtime.load(tiny_engine, max_sequences=2, queue_limit=1) as engine:
        alone = [engine.generate(prompt, **options).token_ids for prompt in PROMPTS * 2]
        assert [one.token_ids for one in engine.generate(PROMPTS * 2, **options)] == alone
        assert not engine.metrics().running
        # The deadline counts from the call for those as well that begin later.
        late = engine.generate(PROMPTS * 2, max_new_tokens=200, ignore_eos=True, deadline=0.001)
        assert {one.finish_reason for one in late} == {"deadline"}
        # What others have taken is refused.
        others = [engine.stream(prompt, max_new_tokens=200, ignore_eos=True) for prompt in PROMPTS[:3]]
        for other in others:
            next(other)
        with pytest.raises(QueueFullError, match="queue_limit 1"):
            engine.generate(PROMPTS, **options)
        for other in others:
            other.close()
        assert len(engine.generate(PROMPTS, **options)) == 4


def test_the_engine_is_not_used_inside_its_own_step(engine):
    for use in (lambda: engine.generate("hello"), lambda: engine.logits([1]), engine.warmup):

        def hook(context, logits, use=use):
            use()
            return logits

        with pytest.raises(GenerationError, match="a hook or a drafter used the engine that is calling it"):
            engine.generate("hello", max_new_tokens=1, logits_processor=hook)
    assert engine.generate("hello", max_new_tokens=2).stats.tokens == 2


def test_hooks_hear_of_every_round_and_generation(tiny_engine, caplog):
    rounds, generations = [], []

    def fail(step):
        rounds.append(step)
        raise ZeroDivisionError

    with runtime.load(tiny_engine, on_round=fail, on_generation=generations.append) as engine:
        answer = engine.generate(PROMPTS[0], max_new_tokens=9, ignore_eos=True)
        assert [token for step in rounds for token in step.tokens] == list(answer.token_ids)
        assert generations == [answer.stats]
        stream = engine.stream("hello", max_new_tokens=9, ignore_eos=True)
        next(stream)
        stream.close()
        assert generations[1].finish_reason == ""
        assert generations[1].tokens == 1
    assert "a metrics hook failed" in caplog.text


def test_logs_are_structured_and_off_by_default(engine, caplog, capfd):
    engine.generate("hello", max_new_tokens=5, ignore_eos=True)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="quasar.runtime"):
        answer = engine.generate("hello", max_new_tokens=5, ignore_eos=True)
    assert [record.levelname for record in caplog.records].count("INFO") == 1
    last = caplog.records[-1]
    assert last.generation["tokens"] == 5
    assert last.generation["finish_reason"] == "length"
    assert len([record for record in caplog.records if hasattr(record, "round")]) == answer.stats.rounds + 1


def test_stop_strings_ids_and_seeds_on_a_real_engine(engine):
    free = engine.generate(PROMPTS[1], max_new_tokens=60, ignore_eos=True, temperature=1, seed=5)
    assert free.stats.seed == 5
    stop = free.text[20:23]
    for drafter in ("none", "prompt-lookup"):
        options = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 1, "seed": 5, "drafter": drafter}
        stopped = engine.generate(PROMPTS[1], stop=stop, **options)
        assert stopped.text == free.text[: free.text.index(stop)]
        assert (stopped.finish_reason, stopped.stopped_by) == ("stop", stop)
        assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
        token = free.token_ids[7]
        stopped = engine.generate(PROMPTS[1], stop_token_ids=[token], **options)
        assert (stopped.finish_reason, stopped.stopped_by) == ("stop", token)
        assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    drawn = engine.generate(PROMPTS[1], max_new_tokens=20, temperature=1)
    again = engine.generate(PROMPTS[1], max_new_tokens=20, temperature=1, seed=drawn.stats.seed)
    assert again.token_ids == drawn.token_ids


def test_a_closed_engine(tiny_engine):
    engine = runtime.load(tiny_engine)
    stream, conversation = engine.stream("hello"), engine.session()
    next(stream)
    engine.close()
    engine.close()
    for use in (
        lambda: next(stream),
        lambda: engine.generate("hello"),
        lambda: engine.stream("hello"),
        lambda: engine.session(),
        lambda: engine.warmup(),
        lambda: engine.memory(),
        lambda: engine.logits([1]),
        lambda: engine.astream("hello"),
        lambda: conversation.generate("hello"),
    ):
        with pytest.raises(GenerationError, match="this engine is closed"):
            use()


def test_memory_says_what_there_is(engine, tiny_engine):
    contract = engine.manifest.contract
    memory = engine.memory()
    assert memory.cache == engine.metrics().slots * contract.cache_bytes
    assert memory.weights > 4 * 320 * 64
    engine.generate("hello", temperature=1, max_new_tokens=2)
    assert engine.memory().buffers >= 4 * contract.max_width * contract.vocab_size


def test_external_bytes_are_those_of_the_graph(tiny_engine):
    import onnx_ir as ir

    for name in ("verifier.onnx", "onnxruntime/verifier.onnx"):
        model = ir.load(tiny_engine / name)
        expected = sum(
            value.const_value.nbytes
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        )
        assert external_bytes((tiny_engine / name).read_bytes()) == expected > 0


def test_many_short_generations_leak_no_memory(engine):
    """Peak resident memory, after a warm-up; 2,000 on the real model: docs/runtime.md."""
    engine.warmup()
    for _ in range(50):
        engine.generate("hello", max_new_tokens=3, temperature=1, stop="zzz", logprobs=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(400):
        engine.generate("hello", max_new_tokens=3, temperature=1, seed=seed, stop="zzz", logprobs=1)
    # KiB on Linux. 400 of them must not keep even one KV cache of 0.4 MB or one row of logits each.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048
