"""Calibration text: the shipped sets and their answers, overlap, what is read of a prompt, how much text there is."""

from dataclasses import replace

import pytest

from calibration.texts import (
    TokenizedText,
    calibration_tokens,
    default_prompts,
    fingerprint,
    fit_texts,
    inputs_hash,
    prompts_hash,
    refuse_overlap,
    tokenize,
)
from quasar.errors import BuildError
from quasar.text import ChatTemplate, Message, Prompt, TextCodec
from tests.tiny import save_tiny_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[a]"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama") / "tokenizer.json"


@pytest.fixture
def codec(tokenizer_file):
    return TextCodec.from_file(tokenizer_file, ChatTemplate(TEMPLATE))


def prompt(text, answer="", category=""):
    return Prompt(messages=({"role": "user", "content": text},), answer=answer, category=category)


def test_shipped_sets_are_disjoint_and_varied():
    calibration, evaluation = default_prompts("calibration"), default_prompts("evaluation")
    refuse_overlap(calibration, evaluation, "the evaluation prompts")
    assert len({item.category for item in calibration}) >= 10
    assert len({fingerprint(item) for item in calibration}) == len(calibration) >= 50
    assert any(ord(character) > 0x3000 for item in calibration for character in item.text)


def test_overlap_is_found_whatever_the_case_and_spacing():
    evaluation = [prompt("Why do  leaves change\ntheir colour in autumn, and what are the pigments called?")]
    for text in (
        "why do leaves change their colour in autumn, AND what are the pigments called?",
        "Here is a question. Why do leaves change their colour in autumn, and what are the pigments called? Thanks.",
        "leaves change their colour in autumn, and what are the pigments",
    ):
        with pytest.raises(BuildError, match="calibration prompt 1"):
            refuse_overlap([prompt(text)], evaluation, "x")
    refuse_overlap([prompt("leaves")], evaluation, "x")


def test_shipped_prompts_have_answers_that_no_other_set_has():
    calibration, evaluation = default_prompts("calibration"), default_prompts("evaluation")
    answers = [" ".join(item.answer.casefold().split()) for item in calibration + evaluation]
    assert all(answers)
    assert len(set(answers)) == len(answers)
    calibrated = [" ".join(f"{item.text} {item.answer}".casefold().split()) for item in calibration]
    for item in evaluation:
        # Halves of lines, too: a sentence that was copied flatters as much as a whole answer.
        for line in item.answer.casefold().splitlines():
            words = line.split()
            for begin in range(max(1, len(words) - 7)):
                part = " ".join(words[begin : begin + 8])
                assert len(part) < 30 or not any(part in text for text in calibrated), part


def test_an_answer_stands_after_the_prompt_and_is_cut(codec):
    asked = prompt("How does a kettle know?", answer="It has a bimetal strip.")
    [text] = tokenize([asked], codec, prompt_tokens=512, answer_tokens=64)
    assert codec.decode(text.prompt) == "[user]How does a kettle know?[a]"
    assert codec.decode(text.continuation) == "It has a bimetal strip."
    assert text.tokens == text.prompt + text.continuation
    [cut] = tokenize([asked], codec, prompt_tokens=5, answer_tokens=3)
    assert (cut.prompt, cut.continuation) == (text.prompt[:5], text.continuation[:3])


def test_a_prompt_without_an_answer_has_no_continuation(codec):
    [text] = tokenize([prompt("Hello")], codec, prompt_tokens=512, answer_tokens=64)
    assert text.continuation == ()


def test_an_answer_brings_no_special_tokens(tokenizer_file, codec):
    special = {token for token, one in codec.tokenizer.get_added_tokens_decoder().items() if one.special}
    spelled = "".join(one.content for one in codec.tokenizer.get_added_tokens_decoder().values() if one.special)
    assert special
    for reader in (codec, TextCodec.from_file(tokenizer_file, None)):
        [text] = tokenize([prompt("a", answer=f"b {spelled}")], reader, prompt_tokens=512, answer_tokens=64)
        assert not special & set(text.continuation)
        assert spelled in reader.decode(text.continuation)


def test_without_a_template_an_empty_line_comes_before_the_answer(tokenizer_file):
    plain = TextCodec.from_file(tokenizer_file, None)
    [text] = tokenize([prompt("Why?", answer="Because.")], plain, prompt_tokens=64, answer_tokens=64)
    assert plain.decode(text.continuation) == "\n\nBecause."


def test_large_models_are_given_less_text():
    assert calibration_tokens(135_000_000) == 4096
    assert calibration_tokens(1_500_000_000) == 1333
    assert calibration_tokens(70_000_000_000) == 1024


def test_texts_are_taken_from_each_category_in_turn_until_the_tokens_are_used_up():
    prompts = [prompt(str(place), category=category) for place, category in enumerate("aaabbc")]
    texts = [TokenizedText(prompt=(place,) * 6, continuation=(9,) * 4) for place in range(6)]

    def kept(max_tokens):
        some, fitting = fit_texts(prompts, texts, max_tokens)
        assert [texts[int(one.text)] for one in some] == fitting
        return [int(one.text) for one in some]

    # In turn: 0, 3, 5, then 1, 4, then 2; what is kept is in file order.
    assert kept(60) == [0, 1, 2, 3, 4, 5]
    assert kept(59) == [0, 1, 3, 4, 5]
    assert kept(30) == [0, 3, 5]
    assert kept(29) == [0, 3]
    # Never none.
    assert kept(5) == [0]


def test_other_answers_make_another_calibration():
    one, other = [prompt("Why?", answer="A")], [prompt("Why?", answer="B")]
    assert prompts_hash(one) == prompts_hash(list(one)) != prompts_hash(other)
    assert fingerprint(one[0]) == fingerprint(other[0])


def test_what_a_build_reads_of_prompts_is_hashed_to_the_letter():
    one = [Prompt(messages=(Message(role="user", content="if x:\n    pass"),), category="code", answer="yes")]
    for changed in (
        replace(one[0], messages=(Message(role="user", content="if x:\n  pass"),)),
        replace(one[0], messages=(Message(role="system", content="if x:\n    pass"),)),
        replace(one[0], category="maths"),
        replace(one[0], answer="no"),
    ):
        assert inputs_hash([changed]) != inputs_hash(one)
    assert inputs_hash(list(one)) == inputs_hash(one)
