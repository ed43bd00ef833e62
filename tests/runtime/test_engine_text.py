"""An engine's text: special tokens as stops, answers that go on, sampling defaults, template arguments."""

import json
import shutil

import numpy as np
import pytest

import runtime
from quasar.errors import GenerationError, PromptError
from tests.tiny import save_tiny_model

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if loud is defined %}!{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, build_engine):
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "texts", "llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    defaults = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    with runtime.load(build_engine(folder)) as loaded:
        yield loaded


def forced(*tokens):
    """A processor that makes the answer."""

    def process(context, logits):
        place = len(context) - process.begins
        out = np.full_like(logits, -np.inf)
        out[tokens[min(place, len(tokens) - 1)]] = 0
        return out

    return process


def test_a_prompt_of_nothing_is_a_sentence(engine):
    with engine.session() as conversation:
        for call in (engine.generate, conversation.generate):
            with pytest.raises(GenerationError, match="the prompt is empty"):
                call([])


def test_a_prefill_reads_the_options_of_the_answer_that_follows(engine):
    with engine.session() as conversation:
        assert conversation.prefill("hello", sampling="model") > 0


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_a_stop_that_is_a_special_token_stops(engine, drafter):
    special = engine.codec.tokenizer.token_to_id("<|user|>")
    letter = engine.codec.encode_text("x")[0]
    process = forced(letter, letter, special)
    process.begins = len(engine.encode("hi"))
    answer = engine.generate(
        "hi", logits_processor=process, max_new_tokens=9, stop="<|user|>", drafter=drafter, ignore_eos=True
    )
    assert (answer.text, answer.finish_reason, answer.stopped_by) == ("xx", "stop", "<|user|>")
    assert answer.token_ids == (letter, letter, special)
    # Without it the answer goes on.
    assert len(engine.generate("hi", logits_processor=process, max_new_tokens=9, drafter=drafter).token_ids) == 9


def test_a_stop_with_a_special_token_inside_is_refused(engine):
    with pytest.raises(GenerationError, match="which no text holds, since a special token is part of it"):
        engine.generate("hi", stop="\n<|user|>")


def test_the_models_sampling_is_used_when_asked_for(engine):
    assert engine.manifest.sampling_defaults == {"temperature": 0.7, "top_k": 5}
    own = engine.generate("hi", max_new_tokens=8, seed=3)
    assert own.stats.seed is None
    drawn = engine.generate("hi", max_new_tokens=8, seed=3, sampling="model")
    same = engine.generate("hi", max_new_tokens=8, seed=3, temperature=0.7, top_k=5)
    assert drawn.token_ids == same.token_ids
    # What is given goes first.
    assert engine.generate("hi", max_new_tokens=8, sampling="model", temperature=0).token_ids == own.token_ids


def test_a_checkpoint_that_suggests_nothing(tiny_engine):
    with runtime.load(tiny_engine) as loaded, pytest.raises(GenerationError, match="has no sampling defaults"):
        loaded.generate("hi", sampling="model")


def test_an_answer_goes_on_in_a_conversation(engine):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]
    ids = engine.encode(messages, continue_final_message=True)
    assert engine.codec.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "<|user|>hi<|end|><|assistant|>ab"
    alone = engine.generate(messages, continue_final_message=True, max_new_tokens=6)
    with engine.session() as conversation:
        answer = conversation.generate(messages, continue_final_message=True, max_new_tokens=6)
        assert answer.token_ids == alone.token_ids
        assert conversation.messages[-1] == {"role": "assistant", "content": "ab" + answer.text}
        assert len(conversation.messages) == 2


def test_template_arguments_reach_the_prompt(engine):
    plain, loud = engine.encode("hi"), engine.encode("hi", chat_template_kwargs={"loud": True})
    assert len(loud) == len(plain) + 1
    with pytest.raises(PromptError, match="does not read the argument 'quiet'"):
        engine.generate("hi", chat_template_kwargs={"quiet": True})
    with pytest.raises(PromptError, match="does not read them"):
        engine.generate("hi", tools=[{"type": "function"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": ""}, "chat_template is ''"),
        ({"tools": {"a": 1}}, "a list of objects"),
        ({"chat_template_kwargs": [1]}, "names with values"),
        ({"date": 3}, "date is 3"),
        ({"sampling": "best"}, "sampling is 'best'; 'own' or 'model'"),
        ({"chat_template": False, "date": "2026-01-01"}, "date has a meaning with a chat template alone"),
    ],
)
def test_options_that_cannot_be_honoured(engine, options, message):
    with pytest.raises(GenerationError, match=message):
        engine.generate("hi", **options)


def test_an_engine_of_an_earlier_version_has_ids_alone(engine, tmp_path):
    """Neither end tokens nor sampling defaults: it keeps its hash, and loads."""
    from engines.manifest import Manifest

    value = json.loads((engine._loaded.directory.path / "manifest.json").read_text())
    del value["text"]["end_tokens"], value["sampling_defaults"]
    manifest = Manifest.from_json(value)
    assert "end_tokens" not in manifest.to_json()["text"]
    assert "sampling_defaults" not in manifest.to_json()
    assert manifest.text.eos_token_ids == (256,)
    value["hashes"]["engine"] = manifest.engine_hash
    shutil.copytree(engine._loaded.directory.path, tmp_path / "old")
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(value))
    with runtime.load(tmp_path / "old") as old:
        assert old.generate("hi", max_new_tokens=4).token_ids == engine.generate("hi", max_new_tokens=4).token_ids
