"""Recorded generations: what is written while an engine answers, and what can be read again."""

import json
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import runtime
from engines.probes.row_invariance import RowInvariance
from evaluation.exactness import verify
from evaluation.traces import read_trace
from quasar.errors import GenerationError
from quasar.text import read_prompts
from runtime import traces
from runtime.control import FixedControl
from runtime.control.control import NoControl
from runtime.drafters import PromptLookup, Recycling, Suffix
from runtime.testing import TableSession, run_loop
from runtime.traces import Recorder, RecordingControl, TracedGeneration
from tests.commands import command, refused
from tests.runtime.test_loop import Trees, expected, hashed, looping

PROMPT = "one two one two one"
GENERATION = TracedGeneration(category="a", prompt=(1, 2), tokens=(3, 4), top=((3, 5), (4, 0)))


@pytest.fixture(scope="module")
def engine(tiny_engine):
    with runtime.load(tiny_engine) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": PROMPT, "category": "a"}, {"turns": ["abc abc", "again"], "category": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


def record(engine, path, **options):
    """One answer, and what was recorded of it."""
    with Recorder(path) as recorder:
        generation = engine.generate(PROMPT, recorder=recorder, **options)
    vocab_size, (traced,) = read_trace(path)
    assert vocab_size == engine.manifest.contract.vocab_size
    return generation, traced


class TestEngine:
    @pytest.mark.parametrize("drafter", ["none", "auto", "prompt-lookup"])
    def test_the_answer_and_what_was_likeliest(self, engine, path, drafter):
        generation, traced = record(engine, path, drafter=drafter, max_new_tokens=40, ignore_eos=True)
        assert (traced.category, list(traced.prompt)) == ("", engine.encode(PROMPT).tolist())
        assert traced.tokens == generation.token_ids
        assert len(traced.tokens) == 40
        assert {len(row) for row in traced.top} == {engine.manifest.contract.top_k}
        # Greedily, the likeliest token is the one that was taken.
        assert tuple(row[0] for row in traced.top) == traced.tokens

    @pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 5}], ids=["greedy", "drawn"])
    def test_drafters_change_nothing_that_is_recorded(self, engine, path, options):
        options = {**options, "max_new_tokens": 60, "ignore_eos": True}
        plain, traced_plainly = record(engine, path, drafter="none", **options)
        for drafter in ("auto", "prompt-lookup"):
            speculative, traced = record(engine, path, drafter=drafter, num_draft_tokens=5, **options)
            assert speculative.stats.drafted > 0
            assert traced.tokens == traced_plainly.tokens == plain.token_ids
            if engine.kernels.startswith("native"):
                assert traced.top == traced_plainly.top
        if options.get("temperature"):
            assert tuple(row[0] for row in traced.top) != traced.tokens
            greedy, _ = record(engine, path, max_new_tokens=60, ignore_eos=True)
            assert greedy.token_ids != traced.tokens

    def test_a_sequence_that_stops_in_an_accepted_block(self, engine, path):
        whole = engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids
        generation, traced = record(engine, path, drafter="auto", max_new_tokens=30, stop_token_ids=[whole[11]])
        assert traced.tokens == generation.token_ids == whole[: whole.index(whole[11]) + 1]
        assert len(traced.top) == len(traced.tokens)

    def test_a_stream_that_is_closed_early(self, engine, path):
        with Recorder(path) as recorder:
            events = engine.stream(PROMPT, recorder=recorder, max_new_tokens=50, ignore_eos=True)
            seen = [token for _ in range(4) for token in next(events).token_ids]
            events.close()
        _, (traced,) = read_trace(path)
        assert list(traced.tokens[: len(seen)]) == seen
        assert len(traced.tokens) < 50

    def test_a_recorder_that_is_closed_ends_no_answer(self, engine, path, caplog):
        """The stream outlives the file: the answer is whole, its statistics come, a conversation goes on."""
        told = []
        with runtime.load(engine._loaded.directory.path, on_generation=told.append) as heard, heard.session() as talk:
            with Recorder(path) as recorder:
                stream = talk.stream(PROMPT, recorder=recorder, max_new_tokens=5, ignore_eos=True)
                next(stream)
            with caplog.at_level(logging.WARNING, "quasar.runtime"):
                list(stream)
            assert "a generation could not be recorded" in caplog.text
            assert len(told) == 1
            assert len(talk.messages) == 2

    def test_threads_share_a_recorder(self, path):
        one = TracedGeneration(category="", prompt=(1, 2), tokens=tuple(range(50)), top=())
        with Recorder(path) as recorder, ThreadPoolExecutor(8) as pool:
            for _ in range(200):
                pool.submit(recorder.write, one, 100)
        vocab_size, found = read_trace(path)
        assert (vocab_size, len(found)) == (100, 200)
        assert set(found) == {one}

    def test_a_conversation(self, engine, path):
        with Recorder(path) as recorder, engine.session() as conversation:
            answers = [conversation.generate(text, recorder=recorder, max_new_tokens=9) for text in ("ab ab", "and")]
        _, traced = read_trace(path)
        assert [one.tokens for one in traced] == [answer.token_ids for answer in answers]
        # The second prompt holds the first answer.
        assert len(traced[1].prompt) > len(traced[0].prompt) + len(traced[0].tokens) - 1

    def test_verify_records_speculative_answers_with_their_category(self, engine, few_prompts, path):
        prompts = read_prompts(few_prompts, None)
        with Recorder(path) as recorder:
            exactness = verify(engine, prompts, {"max_new_tokens": 12}, recorder=recorder)
        _, traced = read_trace(path)
        assert exactness.identical == len(prompts) == len(traced)
        assert [one.category for one in traced] == [prompt.category for prompt in prompts]
        assert [list(one.prompt) for one in traced] == [engine.encode(prompt.messages).tolist() for prompt in prompts]
        assert sum(len(one.tokens) for one in traced) == exactness.tokens

    def test_nothing_is_recorded_of_a_prompt_that_is_refused(self, engine, path):
        with Recorder(path) as recorder, pytest.raises(GenerationError):
            engine.generate([], recorder=recorder, chat_template=False)
        assert path.read_text() == ""

    def test_what_is_no_recorder(self, engine, path):
        with pytest.raises(GenerationError, match=r"recorder is '.*'; a runtime.Recorder was expected"):
            engine.generate(PROMPT, recorder=str(path))


class TestControl:
    """Beside a session whose answers are known."""

    @pytest.mark.parametrize("top_k", [0, 3])
    @pytest.mark.parametrize("drafter", [None, PromptLookup(), Suffix(branches=3), Trees(looping, 5)])
    def test_every_emitted_token(self, path, drafter, top_k):
        control = NoControl() if drafter is None else FixedControl(drafter, 9, trees=True)
        with Recorder(path) as recorder:
            recording = RecordingControl(control, recorder, 100)
            table = TableSession(looping, top_k=top_k)
            exact = RowInvariance(chain=1, widest=32, tree=True)
            rounds = run_loop(table, (1, 2, 3), control=recording, exact=exact, max_new_tokens=40)
            recording.finish()
        assert drafter is None or sum(step.accepted for step in rounds) > 10
        wanted = tuple(expected(looping, (1, 2, 3), 40))
        _, (traced,) = read_trace(path)
        assert (traced.prompt, traced.tokens) == ((1, 2, 3), wanted)
        assert len(traced.top) == (40 if top_k else 0)
        for token, row in zip(wanted, traced.top, strict=False):
            # After the certain token, ties by the lower id.
            assert list(row) == [token, *[other for other in range(4) if other != token][:2]]

    def test_the_other_control_is_told_everything(self, path):
        """Successors that it sees at the beginning and in every round are recycled."""
        rounds = []
        for recorded in (False, True):
            with Recorder(path) as recorder:
                control = FixedControl(Recycling(), 3)
                control = RecordingControl(control, recorder, 100) if recorded else control
                session = TableSession(lambda context: (context[-1] + 1) % 7, top_k=3)
                rounds.append([step.drafted for step in run_loop(session, (0, 6), control=control)])
        assert rounds[0] == rounds[1]
        assert sum(rounds[0]) > 20

    def test_a_sequence_of_one_token(self, path):
        with Recorder(path) as recorder:
            recording = RecordingControl(NoControl(), recorder, 100)
            run_loop(TableSession(hashed, top_k=2), (1, 2), control=recording, max_new_tokens=1)
            recording.finish()
        _, (traced,) = read_trace(path)
        assert traced.tokens == (hashed((1, 2)),)
        assert len(traced.top) == 1

    def test_a_sequence_that_never_began(self, path):
        with Recorder(path) as recorder:
            recording = RecordingControl(NoControl(), recorder, 100)
            run_loop(TableSession(hashed), (1, 2), control=recording, interrupted=lambda: "cancelled")
            recording.finish()
        assert path.read_text() == ""


class TestFile:
    def test_its_bytes(self, path):
        with Recorder(path) as recorder:
            recorder.write(GENERATION, 10)
            recorder.write(TracedGeneration(category="ü", prompt=(9,), tokens=(0,), top=()), 10)
            # Whole lines stand there while the file is open.
            assert path.read_text().count("\n") == 3
        assert path.read_bytes() == (
            b'{"trace":1,"vocab_size":10}\n'
            b'{"category":"a","prompt":[1,2],"tokens":[3,4],"top":[[3,5],[4,0]]}\n'
            b'{"category":"\\u00fc","prompt":[9],"tokens":[0],"top":[]}\n'
        )
        vocab_size, found = read_trace(path)
        assert vocab_size == 10
        assert found == [GENERATION, TracedGeneration(category="ü", prompt=(9,), tokens=(0,), top=())]

    def test_a_generation_that_ends_while_another_is_written(self, path, monkeypatch):
        """The garbage collector may close a stream in the thread that writes: it must not wait for itself."""
        dumps, left = traces.json.dumps, [TracedGeneration(category="b", prompt=(9,), tokens=(0,), top=())]

        def collects(*arguments, **options):
            if left:
                recorder.write(left.pop(), 10)
            return dumps(*arguments, **options)

        with Recorder(path) as recorder:
            monkeypatch.setattr(traces.json, "dumps", collects)
            writer = threading.Thread(target=recorder.write, args=(GENERATION, 10), daemon=True)
            writer.start()
            writer.join(30)
            assert not writer.is_alive()
        assert [one.category for one in read_trace(path)[1]] == ["b", "a"]

    def test_what_stood_there_is_replaced(self, path):
        for tokens in ((3, 4, 5), (6,)):
            with Recorder(path) as recorder:
                recorder.write(TracedGeneration(category="", prompt=(1,), tokens=tokens, top=()), 10)
        assert [one.tokens for one in read_trace(path)[1]] == [(6,)]

    def test_categories_are_those_of_the_moment(self, path):
        with Recorder(path) as recorder:
            for category in ("maths", ""):
                recorder.category = category
                recording = RecordingControl(NoControl(), recorder, 10)
                recorder.category = "later"
                recording.begin(np.array([1]), 2, None)
                recording.finish()
        assert [one.category for one in read_trace(path)[1]] == ["maths", ""]

    def test_a_file_that_cannot_be_written(self, tmp_path):
        with pytest.raises(GenerationError, match=r"none/trace.jsonl cannot be written: .*No such file"):
            Recorder(tmp_path / "none" / "trace.jsonl")
        with pytest.raises(GenerationError, match=r"cannot be written: .*directory"):
            Recorder(str(tmp_path))

    def test_empty_lines_are_skipped(self, path):
        with Recorder(path) as recorder:
            recorder.write(GENERATION, 10)
        path.write_text("\n" + path.read_text().replace("\n", "\n\n \n"))
        assert read_trace(path) == (10, [GENERATION])


class TestCommands:
    def test_generate_records(self, tiny_engine, path):
        options = ("--max-new-tokens", 12, "--record", path, "--json")
        done = command("runtime", "generate", tiny_engine, PROMPT, *options)
        assert done.returncode == 0, done.stderr
        _, (traced,) = read_trace(path)
        assert list(traced.tokens) == json.loads(done.stdout)["token_ids"]
        assert len(traced.top) == len(traced.tokens)

    def test_verify_records(self, tiny_engine, prompts, path):
        options = ("--prompts", prompts, "--max-new-tokens", 12, "--turns", "all", "--record", path)
        done = command("runtime", "verify", tiny_engine, *options)
        assert done.returncode == 0, done.stderr
        assert [one.category for one in read_trace(path)[1]] == ["a", "b", "b"]

    def test_files_that_cannot_be_written(self, tiny_engine, prompts, tmp_path):
        for program in (("generate", tiny_engine, "hi"), ("verify", tiny_engine, "--prompts", prompts)):
            line = refused("runtime", *program, "--record", tmp_path / "none" / "trace.jsonl")
            assert "none/trace.jsonl cannot be written" in line

    def test_statistics_show_what_was_expected(self, tiny_engine):
        done = command("runtime", "generate", tiny_engine, "ab " * 40, "--max-new-tokens", 40, "--stats")
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        (head,) = [place for place, line in enumerate(lines) if line.split()[:3] == ["drafter", "K", "rounds"]]
        rows = [line.split() for line in lines[head + 1 :] if not line.startswith("kernels")]
        assert sum(int(row[2]) for row in rows) == int(re.search(r"tokens in (\d+) rounds", done.stderr)[1])
        # Rounds that a controller chose have figures that were hoped for, too.
        assert any(len(row) == 7 for row in rows)
