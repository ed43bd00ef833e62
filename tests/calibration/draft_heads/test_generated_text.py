"""Text that an engine writes: its frame, its likely tokens, loops, and what the verifier had for each position."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from calibration.draft_heads.chat_frame import chat_frame
from calibration.draft_heads.data_folder import ANSWER, GIVEN, USER
from calibration.draft_heads.generated_text import GeneratedText, TextLimits, TextSource
from calibration.draft_heads.generation import ANSWERS_OF_A_PROMPT, Generation, token_sampler
from calibration.draft_heads.likely_tokens import likely_tokens
from calibration.draft_heads.loops import loop_start
from calibration.draft_heads.passage_tasks import PassageTask
from engines.directory import open_directory
from engines.loading import load_opened
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.text import open_codec
from quasar.errors import PromptError
from quasar.text import ChatTemplate, Prompt, TextCodec

LAYERS = (1, 2)
LIMITS = TextLimits(given=60, user=12, answer=24, least_answer=3, passage=(3, 6))


def test_likely_tokens_are_a_sorted_softmax():
    random = np.random.default_rng(0)
    logits = (random.standard_normal((3, 5000)) * 4).astype(np.float32)
    logits[1, 100:140] = 30.0
    ids, values = likely_tokens(logits)
    for row, one in enumerate(logits):
        order = np.argsort(-one, kind="stable")[:32]
        assert ids[row].tolist() == order.tolist()
        exact = one.astype(np.float64) - np.log(np.exp(one.astype(np.float64)).sum())
        np.testing.assert_allclose(values[row], exact[order], rtol=1e-3)


def test_likely_tokens_of_a_small_vocabulary():
    ids, values = likely_tokens(np.array([[0.0, 2.0, 1.0]], np.float32), 5)
    assert ids.tolist() == [[1, 2, 0, 0, 0]]
    assert np.isneginf(values[0, 3:]).all()
    assert np.exp(values[0, :3].astype(float)).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ([1, 2, 3], None),
        ([*range(30)], None),
        ([5, 6, *[7] * 24], 3),
        ([5, 6, *[7] * 23], None),
        ([9, *[1, 2, 3] * 8], 4),
        ([9, *list(range(20)) * 4], 21),
        ([*list(range(20)) * 4, 99], None),
    ],
)
def test_loops(tokens, start):
    assert loop_start(tokens) == start


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tiny_model / "tokenizer.json"


def test_the_frame_of_a_template(tokenizer):
    codec = TextCodec.from_file(
        tokenizer, ChatTemplate("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}")
    )
    frame = chat_frame(codec)
    assert frame.opening == (codec.tokenizer.token_to_id("<|user|>"),)
    assert (frame.ending, frame.is_chat) == ("", True)
    assert frame.before_ending(" hello \n") == " hello \n"


def test_the_frame_of_a_template_of_words(tokenizer):
    codec = TextCodec.from_file(
        tokenizer, ChatTemplate("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    )
    frame = chat_frame(codec)
    assert codec.decode(frame.opening) == "[INST] "
    assert frame.has_ended("so [/INST] and")
    assert frame.before_ending("so [/INST] and") == "so "


def test_a_template_that_hides_what_is_said(tokenizer):
    codec = TextCodec.from_file(tokenizer, ChatTemplate("<|user|>"))
    with pytest.raises(PromptError, match="does not show what a user says"):
        chat_frame(codec)


@pytest.fixture(scope="module")
def make_generation(tiny_engine):
    """Generation by the tiny engine, and its session; `native` False: on stock kernels, which run a pass a sequence."""
    directory = open_directory(tiny_engine)
    contract = directory.manifest.contract

    def make(slots=4, seed=0, kernels=None, template=True, **options):
        loaded = load_opened(
            directory,
            options=OnnxRuntimeOptions(
                slots=slots, hidden_states=LAYERS, kernels=kernels, max_positions=contract.prefill_chunk + slots
            ),
        )
        codec = open_codec(tiny_engine, directory.manifest.text)
        if not template:
            codec.chat_template = None
        source = TextSource(
            codec=codec,
            frame=chat_frame(codec),
            limits=LIMITS,
            stops=frozenset(directory.manifest.text.eos_token_ids),
            specials=frozenset({256, 257, 258, 259}),
            sampler=token_sampler(),
            num_features=len(LAYERS) * 64,
            vocab_size=contract.vocab_size,
            seed=seed,
        )
        return Generation(loaded.session, source, **options), loaded.session

    return make


def texts_of(generation, count, kept=()):
    found = []
    for text in generation.run(kept):
        if text is not None:
            found.append(text)
        if len(found) == count:
            break
    return found


def assert_same(one, other):
    for name in ("tokens", "kinds", "features", "likely", "log_probabilities"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_text_has_what_a_prefill_has(make_generation):
    generation, session = make_generation()
    texts = texts_of(generation, 5)
    vocabulary = session.contract.vocab_size
    for text in texts:
        sequence = text.sequence()
        tokens = sequence.tokens.tolist()
        assert {*sequence.kinds.tolist()} <= {GIVEN, USER, ANSWER}
        logits = session.run_logits(tokens, 0, len(tokens))
        features = np.concatenate(session.hidden_states, axis=1)
        # The last token may have ended the text, and was not fed then.
        fed = len(tokens) - (not sequence.features[-1].any())
        np.testing.assert_array_equal(sequence.features[:fed], features[:fed].astype(np.float16))
        asked = np.isfinite(sequence.log_probabilities[:, 0])
        ids, values = likely_tokens(logits)
        np.testing.assert_array_equal(sequence.likely[asked], ids[asked])
        np.testing.assert_array_equal(sequence.log_probabilities[asked], values[asked])
        answer = np.flatnonzero(sequence.kinds == ANSWER)
        assert asked[answer[0] - 1 : fed].all()
        if sequence.greedy:
            assert sequence.tokens[answer].tolist() == ids[answer - 1, 0].tolist()
        assert ids.max() < vocabulary


def test_what_a_sequence_says_does_not_depend_on_its_neighbours(make_generation):
    beside = {(text.number, text.turn): text.sequence() for text in texts_of(make_generation(slots=4)[0], 12)}
    alone = {(text.number, text.turn): text.sequence() for text in texts_of(make_generation(slots=1)[0], 8)}
    compared = beside.keys() & alone.keys()
    for number in compared:
        assert_same(beside[number], alone[number])
    assert {turn > 0 for _, turn in compared} == {False, True}


def test_another_seed_says_something_else(make_generation):
    first, other = (texts_of(make_generation(seed=seed)[0], 1)[0] for seed in (0, 1))
    assert first.tokens != other.tokens


def test_numbers_that_are_kept_are_passed_over(make_generation):
    assert 0 not in {text.number for text in texts_of(make_generation()[0], 3, kept={0, 1})}


def test_answers_become_passages_of_further_requests(make_generation, tiny_engine):
    codec = open_codec(tiny_engine, open_directory(tiny_engine).manifest.text)
    generation, _ = make_generation(slots=1)
    texts = texts_of(generation, 30)
    about = [(before, text) for before, text in itertools.pairwise(texts) if text.turn]
    assert len(about) >= 3
    for before, text in about:
        assert (text.number, text.turn) == (before.number, before.turn + 1)
        answer = before.sequence()
        passage = codec.decode(answer.tokens[answer.kinds == ANSWER][:3].tolist()).strip()
        assert passage in text.user_text
        assert text.user_text != passage
    # Some requests are whole, and others end with a question of the model's.
    assert {USER in text.sequence().kinds for _, text in about} == {False, True}


def test_a_passage_may_have_what_ends_a_user_s_words(make_generation, tiny_engine):
    codec = open_codec(tiny_engine, open_directory(tiny_engine).manifest.text)
    source = make_generation()[0]._source
    source = replace(source, frame=replace(source.frame, ending="###"), limits=replace(LIMITS, user=80))
    words = "Context: ### Steps\n\nQuestion:"
    text = GeneratedText(source, 0, task=PassageTask(words=words, is_open=True), turn=1)
    for token in codec.encode_continuation(" why? ### and"):
        if not text.user_text:
            text._take_user(token)
    assert text.user_text == f"{words} why?"


def test_sessions_that_take_one_sequence_a_pass(make_generation):
    generation, session = make_generation(slots=3, kernels="stock")
    assert session.max_sequences == 1
    assert len(texts_of(generation, 2)) == 2


def test_models_without_a_template_write_plain_text(make_generation):
    generation, _ = make_generation(template=False)
    [text] = texts_of(generation, 1)
    sequence = text.sequence()
    assert sequence.kinds[0] == GIVEN
    assert (sequence.kinds == ANSWER).any()


def test_prompts_of_the_user_are_answered_a_few_times(make_generation):
    prompts = [Prompt(messages=({"role": "user", "content": f"Say {word}"},)) for word in ("one", "two")]
    generation, _ = make_generation(prompts=prompts)
    texts = [text for text in generation.run(()) if text is not None]
    assert generation.most_sequences == 2 * ANSWERS_OF_A_PROMPT
    assert len(texts) + sum(generation.dropped.values()) == generation.most_sequences
    for text in texts:
        assert text.greedy == (text.number < 2)
        assert text.user_text == prompts[text.number % 2].text
        assert (text.sequence().kinds != USER).all()


def test_prompts_of_an_evaluation_are_dropped(make_generation, tiny_engine):
    [text] = texts_of(make_generation(slots=1)[0], 1)
    codec = open_codec(tiny_engine, open_directory(tiny_engine).manifest.text)
    # What the user says is what was answered, and no more.
    given = codec.encode_chat([{"role": "user", "content": text.user_text}])
    assert text.tokens[: len(given)] == list(given)
    assert (text.sequence().kinds[len(given) :] == ANSWER).all()
    excluded = [Prompt(messages=({"role": "user", "content": f" {text.user_text.upper()}  "},))]
    generation, _ = make_generation(slots=1, excluded=excluded)
    [other] = texts_of(generation, 1)
    assert other.number != text.number
    assert generation.dropped["a prompt of the evaluation"] == 1


def test_a_long_prompt_is_dropped(make_generation):
    prompts = [Prompt(messages=({"role": "user", "content": "word " * 40},))]
    generation, _ = make_generation(prompts=prompts)
    assert [text for text in generation.run(()) if text is not None] == []
    assert generation.dropped == {"a prompt of more than 72 tokens": ANSWERS_OF_A_PROMPT}


@pytest.mark.parametrize("max_length", [64, 512, 1024, 1200, 4096])
def test_the_longest_prompt_and_its_answer_fit_the_context(max_length):
    limits = TextLimits().within(max_length)
    assert limits.given + limits.user + limits.answer <= max_length
