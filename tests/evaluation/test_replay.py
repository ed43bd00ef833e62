"""Replays of recorded generations: exactly the rounds of a run, with the latencies of a surface."""

import json
import time

import numpy as np
import pytest

import runtime
from engines.directory import open_directory
from engines.probes.row_invariance import RowInvariance
from evaluation.replay import Replay, halves, replay, simulate, total
from evaluation.replay_clock import ReplayClock
from evaluation.replay_conditions import ReplayConditions
from evaluation.traces import read_trace
from quasar.errors import GenerationError
from runtime.control import FixedControl
from runtime.control.control import NoControl
from runtime.control.latency import LatencyModel
from runtime.drafters import Draft, PromptLookup, Suffix
from runtime.drafters.named import VerifierProfile
from runtime.segment import Proposal
from runtime.testing import TableSession, run_loop
from runtime.traces import Recorder, RecordingControl, TracedGeneration
from tests.runtime.test_loop import expected, hashed, looping

LAPTOP = {16: {1: 9.0, 4: 10.3, 8: 15.5}, 1024: {1: 12.0, 4: 14.0, 8: 20.0}}
FREE = {256: {1: 10.0}}
TREES = RowInvariance(chain=1, widest=32, tree=True)


def latencies(surface=LAPTOP):
    return LatencyModel(surface, widest=32)


def traced(tokens, prompt=(1, 2, 3), category=""):
    return TracedGeneration(category=category, prompt=tuple(prompt), tokens=tuple(tokens), top=())


def conditions_of(surface=LAPTOP, **exact):
    exact = RowInvariance(**{"chain": 1, "widest": 32, **exact})
    target = VerifierProfile(vocab_size=100, trees=exact.tree, tells_successors=True, warm={})
    return ReplayConditions(surface_ms=surface, exact=exact, target=target)


def counts(replayed):
    return replayed.tokens, replayed.rounds, replayed.drafted, replayed.accepted


class TestReplay:
    @pytest.mark.parametrize("target", [hashed, looping])
    @pytest.mark.parametrize("count", [1, 2, 40, 150])
    @pytest.mark.parametrize("k", [1, 5, 31])
    @pytest.mark.parametrize(
        "make",
        [PromptLookup, lambda: PromptLookup(match="earliest"), Suffix, lambda: Suffix(branches=3)],
        ids=["lookup", "earliest", "suffix", "tree"],
    )
    def test_a_recorded_run_is_replayed_round_by_round(self, tmp_path, target, count, k, make):
        with Recorder(tmp_path / "trace") as recorder:
            recording = RecordingControl(FixedControl(make(), k, trees=True), recorder, 100)
            session = TableSession(target, top_k=4)
            rounds = run_loop(session, (1, 2, 3), control=recording, exact=TREES, max_new_tokens=count)[1:]
            recording.finish()
        _, (generation,) = read_trace(tmp_path / "trace")
        recorder = RecordedControl(FixedControl(make(), k, trees=True))
        replayed = replay(generation, recorder, latencies())
        assert counts(replayed) == (
            count - 1,
            len(rounds),
            sum(step.drafted for step in rounds),
            sum(step.accepted for step in rounds),
        )
        assert [(len(one.segment.proposal.draft.tokens), tuple(one.tokens.tolist())) for one in recorder.outcomes] == [
            (step.drafted, step.tokens) for step in rounds
        ]

    def test_what_drafters_and_controllers_are_told(self):
        """The tokens and successors of the sequence, as positions of a chain."""
        tokens = (4, 1, 2, 9, 4, 1, 2, 3, 4)
        top = tuple((token, 50 + place) for place, token in enumerate(tokens))
        recorder = RecordedControl(FixedControl(PromptLookup(), 3))
        generation = TracedGeneration(category="", prompt=(1, 2, 3), tokens=tokens, top=top)
        # Nothing; 2 right and 3, 4 wrong; nothing after the 9; 1, 2 right and 9 wrong; no room for a draft.
        assert counts(replay(generation, recorder, latencies())) == (8, 5, 6, 3)
        assert recorder.began == ([1, 2, 3], 4, [[4, 50]])
        sequence = [1, 2, 3, *tokens]
        place = 3
        for one in recorder.outcomes:
            count = len(one.tokens)
            assert one.seen.tolist() == sequence[place : place + count]
            assert one.tokens.tolist() == sequence[place + 1 : place + 1 + count]
            assert len(one.path) == count
            assert one.successors[:, 1].tolist() == list(range(48 + place, 48 + place + count))
            assert one.segment.cache_length == place
            assert len(one.segment.tokens) == 1 + len(one.segment.proposal.draft.tokens)
            assert one.seconds == latencies().of(place).seconds[len(one.segment.tokens) - 1]
            place += count
        assert place == len(sequence) - 1

    def test_what_rounds_take(self):
        """Drafts of nothing, of two that are right, and of one, on a surface of whole numbers."""
        control = Scripted([[], [5, 6], [8]])
        replayed = replay(traced((4, 4, 5, 6, 7, 7), prompt=(1,)), control, latencies({0: {1: 10.0, 2: 20.0, 3: 40.0}}))
        assert counts(replayed) == (5, 3, 3, 2)
        assert replayed.seconds - replayed.draft_seconds == pytest.approx(0.010 + 0.040 + 0.020)
        assert replayed.plain_seconds == pytest.approx(0.050)
        assert replayed.draft_seconds > 0

    def test_plain_passes_take_what_their_cached_length_says(self):
        """Passes further on take longer; a round takes what its first position does."""
        surface = {32: {1: 10.0}, 1056: {1: 20.0}}
        generation = traced(range(100), prompt=[5] * 1000)
        plain = replay(generation, NoControl(), latencies(surface), count_drafting=False)
        assert plain.plain_seconds == pytest.approx(plain.seconds)
        assert 99 * 0.019 < plain.seconds < 99 * 0.0202

    def test_a_round_is_compared_with_plain_passes_of_its_own_rows(self):
        """A millisecond per cached position, by steps of 64: four passes lie before the next step, five after it."""
        surface = {0: {1: 10.0}, 1024: {1: 1034.0}}
        generation = traced([7] * 10, prompt=[5] * 60)
        replayed = replay(generation, Scripted([[7] * 8]), latencies(surface))
        assert counts(replayed) == (9, 1, 8, 8)
        assert replayed.plain_seconds == pytest.approx(4 * 0.042 + 5 * 0.106)

    @pytest.mark.parametrize("surface", [LAPTOP, FREE])
    def test_plain_decoding_is_as_fast_as_plain_decoding(self, surface):
        plain = replay(traced(range(90)), NoControl(), latencies(surface), count_drafting=False)
        assert counts(plain) == (89, 89, 0, 0)
        assert plain.speed_up == pytest.approx(1.0, rel=1e-12)
        assert plain.acceptance_length == 1.0

    def test_time_for_drafting_counts_where_it_is_asked_for(self):
        generation = traced(expected(looping, (1, 2, 3), 60))
        with_it, without = (
            replay(generation, FixedControl(PromptLookup(), 5), latencies(), count_drafting=count)
            for count in (True, False)
        )
        assert with_it.seconds == pytest.approx(without.seconds + with_it.draft_seconds)
        assert with_it.draft_seconds > without.draft_seconds == 0
        assert without.speed_up > with_it.speed_up > 0

    def test_a_text_of_one_token(self):
        replayed = replay(traced([7]), FixedControl(PromptLookup(), 5), latencies())
        assert counts(replayed) == (0, 0, 0, 0)
        assert (replayed.acceptance_length, replayed.speed_up) == (1.0, 1.0)
        assert replayed.to_json()["ms_per_round"] == replayed.to_json()["draft_ms_per_round"] == 0.0


class RecordedControl:
    """Another control, and what it was told."""

    def __init__(self, control):
        self.control, self.outcomes = control, []

    def begin(self, prompt, first, successors):
        self.began = (prompt.tolist(), first, None if successors is None else successors.tolist())
        self.control.begin(prompt, first, successors)

    def propose(self, context, most, cache_length):
        return self.control.propose(context, most, cache_length)

    def learn(self, outcome):
        self.outcomes.append(outcome)
        self.control.learn(outcome)


class Scripted(RecordedControl):
    """Drafts these, round by round."""

    def __init__(self, drafts):
        super().__init__(NoControl())
        self.plans = [Proposal(draft=Draft(tokens=np.array(tokens, np.int64))) for tokens in drafts]

    def propose(self, context, most, cache_length):
        return self.plans.pop(0)


class TestSimulate:
    def test_plain_decoding(self):
        result = simulate([traced(range(50)), traced([1])], conditions_of(), "none", count_drafting=False)
        assert result["speed_up"] == result["mean_speed_up"] == pytest.approx(1.0)
        assert (result["prompts"], result["tokens"], result["rounds"]) == (2, 49, 49)
        assert (result["drafted"], result["accepted"], result["acceptance_length"]) == (0, 0, 1.0)

    def test_sums_and_means_by_category(self):
        loop, random = (expected(target, (1, 2, 3), 60) for target in (looping, hashed))
        generations = [traced(loop, category="a"), traced(random[:20], category="b"), traced(loop[:30], category="a")]
        done = []
        result = simulate(
            *(generations, conditions_of(), "prompt-lookup"),
            num_draft_tokens=5,
            count_drafting=False,
            on_generation=lambda: done.append(1),
        )
        assert len(done) == 3
        assert list(result["categories"]) == ["a", "b"]
        one_by_one = [
            replay(one, FixedControl(PromptLookup(), 5), latencies(), count_drafting=False) for one in generations
        ]
        for part, replays in (
            (result, one_by_one),
            (result["categories"]["a"], [one_by_one[0], one_by_one[2]]),
            (result["categories"]["b"], [one_by_one[1]]),
        ):
            assert part["prompts"] == len(replays)
            assert part["tokens"] == sum(one.tokens for one in replays)
            assert part["rounds"] == sum(one.rounds for one in replays)
            assert part["acceptance_length"] == part["tokens"] / part["rounds"]
            plain, seconds = (sum(getattr(one, name) for one in replays) for name in ("plain_seconds", "seconds"))
            assert part["speed_up"] == pytest.approx(plain / seconds)
            assert part["mean_speed_up"] == pytest.approx(np.mean([one.speed_up for one in replays]))
            assert part["ms_per_round"] == pytest.approx(1e3 * seconds / part["rounds"])
        assert set(result) - {"categories", "prompts", "mean_speed_up"} == set(one_by_one[0].to_json())
        assert result["categories"]["a"]["speed_up"] > 1 > result["categories"]["b"]["speed_up"]

    def test_a_controller_gains_where_there_is_something_to_gain_and_loses_nothing_elsewhere(self):
        loop, random = (traced(expected(target, (1, 2, 3), 300)) for target in (looping, hashed))
        assert simulate([loop], conditions_of(), "auto", count_drafting=False)["speed_up"] > 1.5
        assert simulate([random], conditions_of(), "auto", count_drafting=False)["speed_up"] > 0.95
        steep = {0: {1: 10.0, 2: 20.0}}
        assert simulate([loop], conditions_of(steep), "auto", count_drafting=False)["speed_up"] == pytest.approx(1.0)

    def test_texts_learn_from_each_other(self):
        """The second sequence of a kind needs no trying any more."""
        random = traced(expected(hashed, (1, 2, 3), 120))
        drafted = [
            simulate([random] * times, conditions_of(), "suffix", count_drafting=False)["drafted"] for times in (1, 2)
        ]
        assert drafted[1] < 1.5 * drafted[0]

    def test_successors_of_the_text_are_recycled(self):
        tokens = tuple(expected(looping, (1, 2, 3), 60))
        told = TracedGeneration(category="", prompt=(1, 2, 3), tokens=tokens, top=tuple((one, 99) for one in tokens))
        silent = TracedGeneration(category="", prompt=(1, 2, 3), tokens=tokens, top=())
        for generation, drafts in ((told, True), (silent, False)):
            result = simulate([generation], conditions_of(), "recycling", num_draft_tokens=3)
            assert (result["drafted"] > 0) == drafts

    def test_texts_without_a_round_are_not_in_the_mean(self):
        loop = traced(expected(looping, (1, 2, 3), 60))
        result = simulate([loop, traced([1])], conditions_of(), "suffix", num_draft_tokens=7, count_drafting=False)
        assert result["prompts"] == 2
        assert result["mean_speed_up"] == pytest.approx(result["speed_up"])
        assert result["speed_up"] > 1.2

    def test_where_nothing_is_exact_nothing_is_drafted(self):
        result = simulate([traced(range(20))], conditions_of(chain=None, widest=1), "auto", count_drafting=False)
        assert result["speed_up"] == pytest.approx(1.0)
        with pytest.raises(GenerationError, match="speculation would not be exact"):
            simulate([traced(range(20))], conditions_of(chain=None, widest=1), "suffix")

    def test_narrow_passes_are_made_as_wide_as_plain_ones(self):
        """Plain decoding is fed four positions there: three drafts add nothing."""
        steep = {0: {1: 10.0, 2: 20.0}}
        loop = traced(expected(looping, (1, 2, 3), 200))
        result = simulate([loop], conditions_of(steep, chain=4), "suffix", num_draft_tokens=3, count_drafting=False)
        assert result["acceptance_length"] > 2
        assert result["ms_per_round"] == pytest.approx(40.0)
        assert result["speed_up"] == pytest.approx(result["acceptance_length"])

    def test_sums(self):
        one = Replay(tokens=1, rounds=2, drafted=3, accepted=4, seconds=5.0, draft_seconds=6.0, plain_seconds=7.0)
        assert total([one, one, one]) == Replay(
            tokens=3, rounds=6, drafted=9, accepted=12, seconds=15.0, draft_seconds=18.0, plain_seconds=21.0
        )
        assert total([]).speed_up == 1.0


def test_halves():
    traces = [traced([place], category=category) for place, category in enumerate("aabaabbbc")]
    even, odd = halves(traces)
    assert [(one.category, one.tokens[0]) for one in even] == [("a", 0), ("b", 2), ("a", 3), ("b", 6), ("c", 8)]
    assert [(one.category, one.tokens[0]) for one in odd] == [("a", 1), ("a", 4), ("b", 5), ("b", 7)]
    assert halves([]) == ([], [])


@pytest.fixture(scope="module")
def recorded(tiny_engine, tmp_path_factory):
    """A plain generation of the tiny engine."""
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    with runtime.load(tiny_engine) as engine, Recorder(path) as recorder:
        engine.generate("one two three", max_new_tokens=40, ignore_eos=True, drafter="none", recorder=recorder)
    return read_trace(path)


class TestEnginesThatDraft:
    """They run; what their passes take is what a surface says."""

    @pytest.fixture
    def costs(self, tmp_path):
        def write(name, surface):
            path = tmp_path / name
            path.write_text(json.dumps(surface))
            return path

        return write

    def test_their_passes_take_what_the_file_says(self, tiny_engine, recorded, costs):
        """The engine drafts for itself, so all is right: three passes of one position a round, after the prompt's."""
        vocab_size, generations = recorded
        conditions = ReplayConditions.read(
            tiny_engine,
            costs("verifier.json", {16: {1: 10.0, 128: 10.0}}),
            vocab_size,
            draft_costs=costs("draft.json", {16: {1: 2.0, 128: 2.0}}),
        )
        result = simulate(generations, conditions, f"model:{tiny_engine}", num_draft_tokens=3, count_drafting=False)
        # 39 tokens after the first: nine rounds of four and one of three, whose last needs no draft.
        assert (result["rounds"], result["drafted"], result["accepted"]) == (10, 29, 29)
        assert result["ms_per_round"] * 10 == pytest.approx(10 * 10.0 + 29 * 2.0)
        assert conditions.clock.charged == pytest.approx(29 * 2e-3)

    def test_what_proposes_to_them_saves_passes(self, tiny_engine, recorded, costs):
        """Wider passes take longer, fewer are made; the drafts are the same."""
        vocab_size, generations = recorded
        found = {}
        for kind in ("model", "hierarchical"):
            conditions = ReplayConditions.read(
                tiny_engine,
                costs("verifier.json", {16: {1: 10.0, 128: 10.0}}),
                vocab_size,
                draft_costs=costs("draft.json", {16: {1: 2.0, 128: 2.0}}),
            )
            found[kind] = simulate(
                generations, conditions, f"{kind}:{tiny_engine}", num_draft_tokens=5, count_drafting=False
            )
        assert found["hierarchical"]["accepted"] == found["model"]["accepted"]
        assert found["hierarchical"]["ms_per_round"] < found["model"]["ms_per_round"]

    def test_their_own_costs_where_no_others_are_given(self, tiny_engine, recorded):
        vocab_size, generations = recorded
        conditions = ReplayConditions.read(tiny_engine, None, vocab_size)
        simulate(generations, conditions, f"model:{tiny_engine}", num_draft_tokens=3)
        own = LatencyModel(open_directory(tiny_engine).manifest.record.cost_surface_ms, widest=32)
        assert conditions.clock.charged == pytest.approx(29 * own.of(0).seconds[0], rel=0.5)

    def test_the_controller_goes_by_their_latency(self, tiny_engine, recorded, costs):
        """At a latency above the verifier's own they are not asked any more, however fast they are here."""
        vocab_size, generations = recorded
        drafted = {}
        for ms in (1.0, 11.0):
            conditions = ReplayConditions.read(
                tiny_engine,
                costs("verifier.json", {16: {1: 10.0, 128: 10.0}}),
                vocab_size,
                draft_costs=costs("draft.json", {16: {1: ms, 128: ms}}),
            )
            drafted[ms] = simulate(generations, conditions, f"model:{tiny_engine}", count_drafting=False)["drafted"]
        assert drafted[1.0] > 20 > 5 > drafted[11.0]

    def test_no_cache_to_share(self, tiny_engine, recorded):
        conditions = ReplayConditions.read(tiny_engine, None, recorded[0])
        with pytest.raises(GenerationError, match="cannot draft on the verifier's cache: a replay has none of the"):
            simulate(recorded[1], conditions, f"self:{tiny_engine}")

    def test_costs_of_drafting_without_an_engine(self, costs):
        path = costs("draft.json", {16: {1: 2.0}})
        with pytest.raises(GenerationError, match="compared with the verifier's: give --engine DIR, too"):
            ReplayConditions.read(None, path, 10, draft_costs=path)


def test_the_clock_shows_latencies_in_place_of_what_work_took():
    clock = ReplayClock()
    start = clock()
    with clock.charging(5.0):
        time.sleep(0.05)
    assert clock.charged == 5.0
    # Whatever the sleep took is not shown; a busy machine may add a little around it.
    assert 5.0 <= clock() - start < 5.04


def test_no_pass_reaches_over_a_boundary():
    """At 40 positions attention sums otherwise: a round before it drafts up to there, as the loop's does."""
    generation = traced([7] * 60, prompt=[7] * 10)
    recorder = RecordedControl(FixedControl(PromptLookup(), 8))
    replay(generation, recorder, latencies(), exact=RowInvariance(chain=1, widest=32, boundaries=(40,)))
    passes = [one.segment for one in recorder.outcomes]
    spans = [(one.cache_length + 1, one.cache_length + len(one.tokens)) for one in passes]
    assert any(last == 39 for _, last in spans)
    assert all(first >= 40 or last < 40 for first, last in spans)
    assert max(last - first for first, last in spans) == 8
