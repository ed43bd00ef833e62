"""What a build keeps for token recycling: the engine's own likeliest tokens over the calibration text."""

import numpy as np
import pytest

import runtime
from calibration.texts import (
    CALIBRATION_ANSWER_TOKENS,
    TokenizedText,
    fit_lengths,
    read_texts,
    tokenize,
    write_texts,
)
from engines.directory import open_directory
from engines.successors import SUCCESSORS, count_successors
from engines.text import open_codec
from quasar.text import read_prompts


@pytest.fixture(scope="module")
def engine(tiny_engine):
    with runtime.load(tiny_engine) as loaded:
        yield loaded


def test_they_are_tokens_of_the_vocabulary(tiny_engine):
    directory = open_directory(tiny_engine)
    contract = directory.manifest.contract
    assert SUCCESSORS in directory.manifest.files
    found = directory.successors()
    assert len(found) > 30
    for token, successors in found.items():
        assert 0 <= token < contract.vocab_size
        assert len(set(successors)) == len(successors) == contract.top_k
        assert all(0 <= successor < contract.vocab_size for successor in successors)


def test_they_are_what_the_engine_says_token_by_token(tiny_engine, few_prompts, engine):
    """The text is made and fed once more, one token at a time."""
    directory = open_directory(tiny_engine)
    contract = directory.manifest.contract
    longest, count = fit_lengths(contract.max_length, CALIBRATION_ANSWER_TOKENS)
    codec = open_codec(tiny_engine, directory.manifest.text)
    texts = tokenize(read_prompts(few_prompts), codec, prompt_tokens=longest, answer_tokens=count)
    session = engine._resources.loaded.session
    passes = []
    for text in texts:
        for place, token in enumerate(text.tokens):
            fed = np.array([token], np.int64)
            session.run(fed, place, 1)
            passes.append((fed, session.top_tokens.copy()))
    assert directory.successors() == count_successors(passes, contract.top_k)


def test_the_runtime_starts_from_them(tiny_engine, engine):
    warm = engine._resources.target.warm
    assert warm == open_directory(tiny_engine).successors() != {}
    # A random model's first token is seldom one of the text.
    texts = (f"{one} {other}" for one in "abcdefghij" for other in "0123456789")
    text = next(text for text in texts if engine.generate(text, drafter="none", max_new_tokens=1).token_ids[0] in warm)
    rounds = []
    with runtime.load(tiny_engine, on_round=rounds.append) as observed:
        observed.generate(text, drafter="recycling", num_draft_tokens=3, max_new_tokens=24)
    # The first token's successors can only be those of the calibration text.
    assert rounds[1].drafter == "recycling"
    assert rounds[1].drafted > 0


def test_an_engine_that_is_not_calibrated_has_them_too(tiny_model, build_engine):
    directory = open_directory(build_engine(tiny_model, precision="fp32"))
    assert len(directory.successors()) > 30


def test_texts_are_read_as_they_were_written(tmp_path):
    texts = [
        TokenizedText(prompt=(1, 2, 3), continuation=(4,)),
        TokenizedText(prompt=(5,), continuation=()),
        TokenizedText(prompt=(6, 49151), continuation=(7, 8)),
    ]
    write_texts(tmp_path / "texts.json", texts)
    assert read_texts(tmp_path / "texts.json") == texts
    write_texts(tmp_path / "texts.json", [])
    assert read_texts(tmp_path / "texts.json") == []
