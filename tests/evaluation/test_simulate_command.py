"""`simulate` as a process sees it, and the engines, latencies and traces that it takes or refuses."""

import json
import os
import re

import pytest

from engines.directory import open_directory
from engines.probes.row_invariance import RowInvariance
from evaluation.replay import replay
from evaluation.replay_conditions import ReplayConditions
from quasar.errors import EngineError, GenerationError, PromptError
from runtime.control import FixedControl
from runtime.control.latency import LatencyModel
from runtime.drafters import PromptLookup
from runtime.drafters.named import VerifierProfile
from runtime.traces import Recorder, TracedGeneration
from tests.commands import command, refused
from tests.runtime.test_loop import expected, looping


def loop(category):
    tokens = tuple(expected(looping, (1, 2, 3), 60))
    return TracedGeneration(category=category, prompt=(1, 2, 3), tokens=tokens, top=())


class TestScenario:
    @pytest.fixture
    def costs(self, tmp_path):
        def write(value):
            path = tmp_path / "costs.json"
            path.write_text(value if isinstance(value, str) else json.dumps(value))
            return path

        return write

    def test_of_costs_alone(self, costs):
        found = ReplayConditions.read(None, costs({"256": {"1": 9.0, "4": 10}, "16": {"1": 8}}), 77)
        assert found.surface_ms == {256: {1: 9.0, 4: 10.0}, 16: {1: 8.0}}
        assert found.exact == RowInvariance(chain=1, widest=32, tree=True)
        assert found.target == VerifierProfile(vocab_size=77, trees=True, tells_successors=True, warm={})

    def test_of_an_engine(self, tiny_engine):
        directory = open_directory(tiny_engine)
        record, contract = directory.manifest.record, directory.manifest.contract
        found = ReplayConditions.read(tiny_engine, None, contract.vocab_size)
        assert (found.surface_ms, found.exact) == (record.cost_surface_ms, record.row_invariance)
        assert found.target.warm == directory.successors() != {}
        assert found.target.trees == record.row_invariance.tree

    def test_of_an_engine_at_other_costs(self, tiny_engine, costs):
        found = ReplayConditions.read(tiny_engine, costs({"256": {"1": 9.0}}), 320)
        assert found.surface_ms == {256: {1: 9.0}}
        assert found.target.warm

    def test_of_neither(self):
        with pytest.raises(
            GenerationError, match="how long passes take is not known: give --engine DIR or --costs FILE"
        ):
            ReplayConditions.read(None, None, 10)

    def test_of_another_vocabulary(self, tiny_engine):
        message = f"{re.escape(str(tiny_engine))} has 320 tokens, the trace's engine had 100"
        with pytest.raises(GenerationError, match=message):
            ReplayConditions.read(tiny_engine, None, 100)

    def test_of_no_engine(self, tmp_path):
        with pytest.raises(EngineError, match="is no engine directory"):
            ReplayConditions.read(tmp_path / "none", None, 100)

    @pytest.mark.parametrize(
        "value",
        [
            *("", "[]", "3", "{", '{"a": {"1": 9.0}}', '{"256": 9.0}', '{"256": {"1": "x"}}', '{"256": {"b": 9.0}}'),
            *('{"256": {"1": null}}', '{"256": {"1": [9.0]}}', '{"1.5": {"1": 9.0}}'),
            pytest.param('{"256": {"1": 1' + "0" * 400 + "}}", id="no float"),
        ],
    )
    def test_costs_that_cannot_be_read(self, costs, value):
        path = costs(value)
        with pytest.raises(PromptError) as error:
            ReplayConditions.read(None, path, 10)
        assert str(error.value).startswith(f"{path} cannot be read as costs (")
        assert str(error.value).endswith(
            'cached length → width → milliseconds was expected, as in {"256": {"1": 9.0, "4": 10.3, "8": 15.5}}'
        )

    @pytest.mark.parametrize(
        "value",
        [
            *("{}", '{"256": {}}', '{"256": {"0": 9.0}}', '{"256": {"1": 0}}', '{"256": {"1": -1}}'),
            *('{"-1": {"1": 9.0}}', '{"256": {"1": 9.0}, "512": {}}', '{"256": {"1": NaN}}'),
            *('{"256": {"1": Infinity}}',),
        ],
    )
    def test_costs_that_make_no_sense(self, costs, value):
        path = costs(value)
        with pytest.raises(PromptError) as error:
            ReplayConditions.read(None, path, 10)
        assert str(error.value).startswith(
            f"{path}: cached lengths, widths and milliseconds above 0 were expected; cached length → width"
        )

    def test_costs_that_are_missing(self, tmp_path):
        with pytest.raises(PromptError, match=r"costs.json cannot be read as costs \(.*No such file"):
            ReplayConditions.read(None, tmp_path / "costs.json", 10)


class TestCommand:
    @pytest.fixture
    def trace(self, tmp_path):
        """Four loops of 60 tokens, of an engine of 320."""
        with Recorder(tmp_path / "trace.jsonl") as recorder:
            for category in ("a", "a", "b", ""):
                recorder.write(loop(category), 320)
        return tmp_path / "trace.jsonl"

    @pytest.fixture
    def costs(self, tmp_path):
        (tmp_path / "costs.json").write_text(json.dumps({"256": {"1": 9.0, "8": 10.0}}))
        return tmp_path / "costs.json"

    def test_at_costs_from_a_file(self, trace, costs, tmp_path):
        options = ("--costs", costs, "--drafter", "prompt-lookup", "--num-draft-tokens", 5)
        wide = {**os.environ, "COLUMNS": "120"}
        done = command("runtime", "simulate", "--trace", trace, *options, "--json", tmp_path / "result.json", env=wide)
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["prompts"], result["tokens"], list(result["categories"])) == (4, 4 * 59, ["a", "b", ""])
        one = replay(loop(""), FixedControl(PromptLookup(), 5), LatencyModel({256: {1: 10.0}}, widest=32))
        assert (result["rounds"], result["accepted"]) == (4 * one.rounds, 4 * one.accepted)
        rows = [line.split() for line in done.stdout.splitlines()]
        assert rows[0][:4] == ["prompts", "acceptance", "length", "speed-up"]
        assert [row[0] for row in rows[1:]] == ["all", "a", "b", "(no"]
        assert rows[1][1:4] == ["4", f"{result['acceptance_length']:.2f}", f"{result['speed_up']:.2f}"]
        assert rows[4][:3] == ["(no", "category)", "1"]

    @pytest.mark.parametrize(("half", "prompts"), [("even", 3), ("odd", 1)])
    def test_of_an_engine_half_of_the_generations(self, tiny_engine, trace, tmp_path, half, prompts):
        options = ("--engine", tiny_engine, "--half", half, "--json", tmp_path / "result.json")
        done = command("runtime", "simulate", "--trace", trace, *options)
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["prompts"] == prompts
        assert result["acceptance_length"] >= 1

    def test_refusals(self, trace, costs, tmp_path):
        replayed = ("runtime", "simulate", "--trace", trace)
        assert "how long passes take is not known: give --engine DIR or --costs FILE" in refused(*replayed)
        line = refused(*replayed, "--costs", costs, "--half", "third")
        assert line == "error: --half is 'third'; even, odd or all was expected"
        line = refused(*replayed, "--costs", costs, "--drafter", "magic")
        assert "unknown drafter 'magic'" in line
        line = refused(*replayed, "--costs", costs, "--drafter", "suffix", "--num-draft-tokens", 32)
        assert "num_draft_tokens is 32; on this machine 0 to 31 drafts are verified exactly" in line
        line = refused(*replayed, "--costs", costs, "--drafter", "model:DIR")
        assert "drafter 'model:DIR' is compared with the verifier, and there is no engine directory of it here" in line
        costs.write_text("{}")
        assert "milliseconds above 0 were expected" in refused(*replayed, "--costs", costs)
        trace.write_text("hello\n")
        assert "trace.jsonl, line 1: not JSON" in refused(*replayed, "--costs", costs)
