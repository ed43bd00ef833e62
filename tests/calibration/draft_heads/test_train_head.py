"""The command: a head that reads back, runs that are stopped and go on, refusals in one sentence."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from typer.testing import CliRunner

from calibration.draft_heads import train_head as module
from calibration.draft_heads.generated_text import TextLimits
from calibration.draft_heads.generation import Generation
from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.head_options import TrainHeadOptions
from calibration.draft_heads.linear_guess import linear_guess
from calibration.draft_heads.target_tensors import first_tensors, head_spec, target_parts
from calibration.draft_heads.train_head import train_head
from calibration.draft_heads.training import Training
from calibration.texts import default_prompts
from engines.directory import open_directory
from quasar.checkpoints import open_checkpoint
from quasar.draft_heads.folder import open_draft_head
from quasar.errors import BuildError, QuasarError
from tests.calibration.draft_heads.heads import random_sequence
from tests.tiny import save_tiny_model


class KilledError(Exception):
    pass


class Heard:
    def __init__(self):
        self.lines = []

    def stage(self, title, detail=""):
        self.lines.append(f"{title} {detail}")


def options_of(engine, output, **changes):
    return TrainHeadOptions(directory=engine, output=output, **{"tokens": 1500, "updates": 4, **changes})


def test_a_head_is_trained_and_reads_back(tiny_engine, tiny_model, tmp_path):
    heard = Heard()
    path = train_head(options_of(tiny_engine, tmp_path / "head", draft_vocab=128), heard)
    target = open_checkpoint(str(tiny_model)).spec
    head = open_draft_head(path, target)
    assert head.spec == head_spec(target, num_layers=3, draft_vocab_size=128)
    assert head.spec.feature_layers == (3,)
    assert len(head.targets) == 128
    assert 256 in head.targets
    manifest = open_directory(tiny_engine).manifest
    assert head.base_model == manifest.model["name"]
    report = json.loads((path / "report.json").read_text())
    assert report["engine"] == manifest.engine_hash
    assert report["data"]["tokens"] >= 1500
    assert report["training"]["updates"] == 4
    assert report["vocabulary"]["tokens"] == 128
    assert 0 < report["vocabulary"]["coverage"] <= 1
    assert len(report["held_out"]["coverage"]["1"]) == 5
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "model.safetensors", "report.json"]
    assert not path.with_name("head.partial").exists()
    assert any(line.startswith("vocabulary 128 of 320 tokens") for line in heard.lines)


def test_a_run_that_is_killed_goes_on(tiny_engine, tmp_path, monkeypatch):
    data = tmp_path / "data"
    whole = train_head(options_of(tiny_engine, tmp_path / "whole"), Heard())
    options = options_of(tiny_engine, tmp_path / "head", data=data)
    updates = []
    make_update = Training._update

    def update(self, blocks):
        updates.append(blocks)
        if len(updates) == 3:
            raise KilledError
        return make_update(self, blocks)

    monkeypatch.setattr(Training, "_update", update)
    with pytest.raises(KilledError):
        train_head(options, Heard())
    assert not (tmp_path / "head").exists()
    heard = Heard()
    path = train_head(options, heard)
    assert not any(line.startswith(("generating", "engine")) for line in heard.lines)
    assert (data / "index.jsonl").is_file()
    for name in ("model.safetensors", "config.json"):
        assert (path / name).read_bytes() == (whole / name).read_bytes()
    # The text serves another head.
    other = train_head(options_of(tiny_engine, tmp_path / "other", data=data, intermediate_size=32), Heard())
    assert json.loads((other / "report.json").read_text())["head"]["intermediate_size"] == 32


def test_a_finished_head_only_gets_its_name(tiny_engine, tmp_path):
    options = options_of(tiny_engine, tmp_path / "head", updates=1)
    path = train_head(options, Heard())
    partial = path.rename(tmp_path / "head.partial")
    # It was killed while it deleted what only the training needs.
    (partial / ".training.dropped").mkdir()
    (partial / ".training.dropped/training.safetensors").write_bytes(b"")
    assert train_head(options, Heard()) == path
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "model.safetensors", "report.json"]


def test_other_choices_say_what_to_delete(tiny_engine, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KilledError

    monkeypatch.setattr(module._Run, "make", stop)
    with pytest.raises(KilledError):
        train_head(options_of(tiny_engine, tmp_path / "head"), Heard())
    with pytest.raises(BuildError, match=r"unfinished training with other inputs \(seed differ\): delete it \(rm -r "):
        train_head(options_of(tiny_engine, tmp_path / "head", seed=1), Heard())


def test_a_clock_splits_the_time(tiny_engine, tmp_path, monkeypatch):
    moments = itertools.count()
    # A second passes whenever somebody looks.
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(moments))))
    monkeypatch.setattr(module, "_FIRST_TOKENS", 512)
    monkeypatch.setattr(module, "TextLimits", lambda: TextLimits(user=12, answer=40))
    path = train_head(TrainHeadOptions(directory=tiny_engine, output=tmp_path / "head", minutes=6), Heard())
    report = json.loads((path / "report.json").read_text())
    assert 512 <= report["data"]["tokens"] < 20000
    assert report["training"]["updates"] >= 4
    # Sixteen sequences end when they end: text that comes late leaves a tenth of the time for the training, and every
    # look at this clock counts as well.
    assert 0.5 * 360 < report["seconds"] < 1.3 * 360


def test_the_first_head_is_the_linear_guess(tiny_model):
    checkpoint = open_checkpoint(str(tiny_model))
    spec, target = head_spec(checkpoint.spec, num_layers=3, draft_vocab_size=64), target_parts(checkpoint)
    tokens = np.arange(0, 320, 5)
    sequences = [guessable_sequence(number, target) for number in range(20)]
    guess = linear_guess(sequences, target)
    tensors = first_tensors(checkpoint, spec, guess, tokens, 0)
    assert {name: value.shape for name, value in tensors.items()} == spec.tensors()
    np.testing.assert_array_equal(tensors["lm_head.weight"], checkpoint.read("lm_head.weight")[tokens])
    model = HeadModel(spec, tensors, target, guess.scales, num_positions=64)
    written = model.tensors()
    for name, value in tensors.items():
        np.testing.assert_allclose(written[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    # What it makes of a sequence that it has not seen: the next hidden state, of which a part is noise.
    other = guessable_sequence(20, target)
    fed, states = torch.from_numpy(other.tokens.astype(np.int64)), target.normed(torch.from_numpy(other.features))
    with torch.no_grad():
        x = model.layer_input(fed[1:], model.states(torch.from_numpy(other.features))[:-1])
        made = model.layer_output(x, torch.zeros(2, 2, len(x), 16)) * torch.from_numpy(guess.scales.hidden)
    error = float((made - states[1:]).square().mean() / states.square().mean())
    assert error < 0.3


def guessable_sequence(number, target):
    """Hidden states that follow from the token and the state before them, but for a tenth."""
    maps, random = np.random.default_rng(0), np.random.default_rng([1, number])
    hidden = len(target.norm)
    of_token, of_state = (maps.standard_normal((hidden, hidden)) / hidden**0.5 for _ in range(2))
    tokens = random.integers(0, 320, 48)
    states = [random.standard_normal(hidden)]
    for token in tokens[1:]:
        normed = target.normed(torch.from_numpy(states[-1].astype(np.float32))).numpy()
        embedded = target.embedding[token].float().numpy()
        embedded = embedded / np.sqrt(np.mean(embedded**2))
        states.append(of_token @ embedded + of_state @ normed + 0.1 * random.standard_normal(hidden))
    rest = random_sequence(number, len(tokens))
    return replace(rest, tokens=tokens.astype(np.int32), features=np.array(states, np.float32))


@pytest.mark.parametrize("intermediate", [48, 160])
def test_an_mlp_of_another_size(tiny_model, intermediate):
    checkpoint = open_checkpoint(str(tiny_model))
    spec = head_spec(checkpoint.spec, num_layers=3, draft_vocab_size=64, intermediate_size=intermediate)
    assert spec.tensors()["layers.0.mlp.up_proj.weight"] == (intermediate, 64)


def said(arguments):
    """What the command says when it refuses."""
    from calibration.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, QuasarError), result.exception
    return str(result.exception)


def test_refusals(tiny_engine, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "Hello there"}\n' * 3)
    output = tmp_path / "head"
    assert "is no engine directory" in said([tmp_path / "nothing", "-o", output])
    assert said([tiny_engine, "-o", output, "--prompts", few]) == (
        f"{few} holds 3 prompts; 16 or more were expected, or no --prompts: the model writes them itself then"
    )
    assert said([tiny_engine, "-o", output, "--minutes", "0.5"]) == (
        "--minutes is 0.5; 1 or more was expected, and 60 for a head of use"
    )
    for minutes in ("nan", "inf"):
        assert f"--minutes is {minutes}; 1 or more was expected" in said(
            [tiny_engine, "-o", output, "--minutes", minutes]
        )
    assert "--draft-vocab is 2; 16 or more" in said([tiny_engine, "-o", output, "--draft-vocab", "2"])
    (tmp_path / "taken").mkdir()
    assert "exists: it is never overwritten" in said([tiny_engine, "-o", tmp_path / "taken"])
    assert not output.with_name("head.partial").exists()


def test_prompts_of_the_evaluation_are_refused(tiny_engine, tmp_path):
    lines = [json.dumps({"prompt": f"A question about the number {number}, please."}) for number in range(20)]
    prompts, excluded = tmp_path / "prompts.jsonl", tmp_path / "excluded.jsonl"
    prompts.write_text("\n".join(lines))
    excluded.write_text(lines[4])
    message = said([tiny_engine, "-o", tmp_path / "head", "--prompts", prompts, "--exclude", excluded])
    assert message == (
        f"prompt 5 ('a question about the number 4, please.'…) is also in {excluded}: figures measured there would "
        f"flatter the head; take it out of {prompts}"
    )
    shipped = default_prompts("evaluation")[0].text
    prompts.write_text("\n".join([*lines, json.dumps({"prompt": shipped})]))
    excluded.write_text(json.dumps({"prompt": "Something else."}))
    message = said([tiny_engine, "-o", tmp_path / "head", "--prompts", prompts, "--exclude", excluded])
    assert "prompt 21 (" in message
    assert "is also in the project's evaluation prompts: " in message


def test_a_model_that_is_gone(build_engine, tiny_model, tmp_path):
    source = shutil.copytree(tiny_model, tmp_path / "model")
    engine = build_engine(source)
    other = save_tiny_model(tmp_path / "other", "llama", seed=9)
    with pytest.raises(BuildError, match=r"is not the model that .* was built from"):
        train_head(options_of(engine, tmp_path / "head", model=str(other)), Heard())
    shutil.rmtree(tmp_path / "head.partial")
    shutil.rmtree(source)
    with pytest.raises(BuildError, match=r"was built from is gone \(.*\): say where it is with --model"):
        train_head(options_of(engine, tmp_path / "head"), Heard())


def test_an_engine_that_lacks_layers(build_engine, tiny_model, tmp_path):
    engine = build_engine(tiny_model, skip_layers="1")
    with pytest.raises(BuildError, match=r"was built without the layers 1, and a draft head learns from"):
        train_head(options_of(engine, tmp_path / "head"), Heard())
    assert not (tmp_path / "head").exists()


def test_answers_to_one_prompt_are_not_enough(tiny_engine, tmp_path, monkeypatch):
    """All of them are held out, or none: there is nothing to learn from."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Tell me of the number {number}."}) + "\n" for number in range(16))
    )
    run = Generation.run

    def of_the_first(self, known):
        return (None if text is not None and text.number % 16 else text for text in run(self, known))

    monkeypatch.setattr(Generation, "run", of_the_first)
    with pytest.raises(BuildError, match="a head cannot be trained on that; give --prompts, or more --minutes"):
        train_head(options_of(tiny_engine, tmp_path / "head", prompts=prompts, tokens=256), Heard())


@pytest.mark.parametrize("written", ["training.safetensors", "model.safetensors"])
def test_a_full_disk_is_a_sentence(tiny_engine, tmp_path, monkeypatch, written):
    """safetensors says so with an error of its own."""

    def full(save_file):
        def save(tensors, path, metadata=None):
            if written in str(path):
                raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
            save_file(tensors, path, metadata)

        return save

    for owner in (safetensors.torch, safetensors.numpy):
        monkeypatch.setattr(owner, "save_file", full(owner.save_file))
    with pytest.raises(BuildError, match=r"the disk of .* refuses \(No space left on device\): make room and run"):
        train_head(options_of(tiny_engine, tmp_path / "head", updates=1), Heard())
    assert not (tmp_path / "head").exists()


def test_an_engine_without_hidden_states(tiny_engine, tmp_path, monkeypatch):
    from quasar.errors import EngineError

    def refuse(directory, options):
        raise EngineError("no output layers.0.output")

    monkeypatch.setattr(module, "load_opened", refuse)
    with pytest.raises(
        BuildError, match=r"a draft head learns from hidden states, which .* cannot tell here: no output"
    ):
        train_head(options_of(tiny_engine, tmp_path / "head"), Heard())


def test_torch_is_missing(tiny_engine, tmp_path, monkeypatch):
    import builtins

    original = builtins.__import__

    def without_torch(name, *arguments):
        if name == "torch":
            raise ImportError(name=name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(BuildError, match=r"torch is not installed; training a draft head needs it: run pip install"):
        train_head(options_of(tiny_engine, tmp_path / "head"), Heard())
