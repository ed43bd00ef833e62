"""Every option that cannot be honoured is an error that says what came and what was expected."""

import asyncio
import math
import threading
import typing

import numpy as np
import pytest

import runtime
from quasar.errors import GenerationError
from runtime.generation_options import OPTIONS, GenerationOptions
from runtime.option_keywords import OptionsDict, cancel_of, make_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; 0 \(the most likely token\), or 1e-6 to 1e6 was expected"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"temperature": 1e7}, "temperature is 10000000.0"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0}, "top_p is 0; more than 0 and at most 1 was expected"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_k": -1}, "top_k is -1; 0 or more was expected"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 1.5}, "min_p is 1.5; 0 to 1 was expected"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; more than 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf; a number was expected"),
        ({"frequency_penalty": None}, "frequency_penalty is None"),
        ({"seed": -1}, "seed is -1; 0 or more was expected"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; 0 to 2\^64 - 1 was expected"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; 1 or more was expected"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5 and max_new_tokens 4"),
        ({"stop": ""}, "stop is ''; strings that are not empty were expected"),
        ({"stop": ["a", ""]}, "strings that are not empty were expected"),
        ({"stop": [5]}, "strings that are not empty were expected"),
        ({"stop": 5}, "stop is 5; strings were expected"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7; token ids were expected"),
        ({"logit_bias": [(1, 2)]}, r"logit_bias is \[\(1, 2\)\]; token ids with numbers were expected"),
        ({"logit_bias": {3: 1e39}}, "logit_bias has 3: 1e\\+39"),
        ({"presence_penalty": 10**400}, "presence_penalty is 1000"),
        ({"num_draft_tokens": 2.5}, "num_draft_tokens is 2.5; 0 or more was expected"),
        ({"logits_processor": 3}, "logits_processor is 3; a function was expected"),
        ({"cancel": True}, "cancel is True; a threading.Event, or the like, was expected"),
        ({"drafter": None}, "drafter is None; a name, or an object with propose, was expected"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; True or False was expected"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids is"),
        ({"logit_bias": {3: math.nan}}, "logit_bias has 3: nan"),
        ({"logit_bias": {3: math.inf}}, "logit_bias has 3: inf"),
        ({"logit_bias": {"a": 1}}, "logit_bias has 'a': 1"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 101}, "logprobs is 101; 0 to 100 was expected"),
        ({"deadline": 0}, "deadline is 0; seconds, more than 0 was expected"),
        ({"top_q": 1}, "unknown option 'top_q'; did you mean 'top_"),
    ],
    ids=str,
)
def test_values_that_cannot_be_honoured(options, message):
    with pytest.raises(GenerationError, match=message):
        make_options(options)


def test_values_that_can():
    options = make_options(
        {
            "temperature": np.float32(0.5),
            "top_k": np.int64(3),
            "stop": "a",
            "cancel": threading.Event(),
            "seed": 2**64 - 1,
        }
    )
    assert options.stop_strings == ("a",)
    assert make_options({"stop": ["a", "b"]}).stop_strings == ("a", "b")
    assert make_options({"stop": None, "stop_token_ids": None}).stop_ids == frozenset()
    assert make_options({"stop_token_ids": iter([3, 4])}).stop_ids == {3, 4}
    assert not GenerationOptions(temperature=0.7, top_p=0.9).changes_logits
    for one in ({"logit_bias": {1: 1.0}}, {"min_new_tokens": 1}, {"repetition_penalty": 1.1}, {"presence_penalty": 1}):
        assert GenerationOptions(**one).changes_logits


def test_ids_outside_the_vocabulary():
    with pytest.raises(GenerationError, match="logit_bias names the token id 50, outside the vocabulary of 50"):
        GenerationOptions(logit_bias={50: 1}).check_vocabulary(50)
    with pytest.raises(GenerationError, match="stop_token_ids names the token id -1"):
        GenerationOptions(stop_token_ids=[-1]).check_vocabulary(50)


def test_both_places_of_an_option_agree():
    """`OptionsDict` is what type checkers read, the fields are the rest."""
    keywords = typing.get_type_hints(OptionsDict)
    assert keywords.pop("options") == GenerationOptions | None
    hints = typing.get_type_hints(GenerationOptions)
    assert keywords == {one.name: hints[one.name] for one in OPTIONS}


def test_every_default_is_fine():
    made = GenerationOptions()
    assert all(getattr(made, one.name) == one.default for one in OPTIONS)


class TestOptionsObject:
    def test_it_is_what_it_says(self):
        options = GenerationOptions(temperature=0.5, seed=3, stop=["a"])
        assert make_options({"options": options}) == options
        assert make_options({"options": None, "seed": 3}) == GenerationOptions(seed=3)

    def test_keywords_are_applied_on_top(self):
        options = GenerationOptions(temperature=0.5, seed=3, stop="a")
        made = make_options({"options": options, "seed": 4, "stop": None})
        assert made == GenerationOptions(temperature=0.5, seed=4)
        assert made.stop_strings == ()

    def test_keywords_are_checked_with_it(self):
        options = GenerationOptions(max_new_tokens=4)
        with pytest.raises(GenerationError, match="min_new_tokens is 5 and max_new_tokens 4"):
            make_options({"options": options, "min_new_tokens": 5})
        with pytest.raises(GenerationError, match="unknown option 'sed'; did you mean 'seed'"):
            make_options({"options": options, "sed": 5})

    def test_other_objects_are_refused(self):
        with pytest.raises(GenerationError, match=r"options is \{'seed': 1\}; a runtime.GenerationOptions"):
            make_options({"options": {"seed": 1}})

    def test_iterators_are_read_once(self):
        options = GenerationOptions(stop=iter(["a", "b"]), stop_token_ids=iter([3, 4]))
        for _ in range(2):
            made = make_options({"options": options, "seed": 1})
            assert (made.stop_strings, made.stop_ids) == (("a", "b"), {3, 4})

    def test_the_models_defaults_are_for_what_was_not_given(self):
        defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
        options = GenerationOptions(sampling="model", top_k=5)
        made = make_options({"options": options, "top_p": 1.0}, defaults)
        assert (made.temperature, made.top_k, made.top_p) == (0.6, 5, 1.0)
        made = make_options({"options": GenerationOptions(top_k=5), "sampling": "model"}, defaults)
        assert (made.temperature, made.top_k, made.top_p) == (0.6, 5, 0.9)
        with pytest.raises(GenerationError, match="has no sampling defaults"):
            make_options({"options": options})
        assert make_options({"options": options, "sampling": "own"}) == GenerationOptions(top_k=5)

    def test_the_callers_own_signal(self):
        mine, other = threading.Event(), threading.Event()
        assert cancel_of({}) is None
        assert cancel_of({"options": GenerationOptions(cancel=mine)}) is mine
        assert cancel_of({"options": GenerationOptions(cancel=mine), "cancel": other}) is other
        assert cancel_of({"options": GenerationOptions(cancel=mine), "cancel": None}) is None

    def test_every_method_takes_it(self, tiny_engine):
        options = GenerationOptions(max_new_tokens=9, temperature=0.8, seed=5, ignore_eos=True)
        prompt = "one two one two"

        async def gathered(events):
            return tuple([token async for event in events for token in event.token_ids])

        with runtime.load(tiny_engine) as engine:
            expected = engine.generate(prompt, max_new_tokens=9, temperature=0.8, seed=5, ignore_eos=True).token_ids
            assert len(expected) == 9
            for maker in (lambda: engine, engine.session):
                assert maker().generate(prompt, options=options).token_ids == expected
                assert maker().generate(prompt, options=options, max_new_tokens=4).token_ids == expected[:4]
                streamed = maker().stream(prompt, options=options)
                assert tuple(token for event in streamed for token in event.token_ids) == expected
                assert asyncio.run(maker().agenerate(prompt, options=options)).token_ids == expected
                assert asyncio.run(gathered(maker().astream(prompt, options=options))) == expected
            assert [one.token_ids for one in engine.generate([prompt, prompt], options=options)] == [expected] * 2
            assert engine.encode(prompt, options=GenerationOptions(chat_template=False)).tolist() == (
                engine.encode(prompt, chat_template=False).tolist()
            )

    def test_its_signal_cancels_an_asynchronous_stream(self, tiny_engine):
        cancel = threading.Event()
        cancel.set()
        options = GenerationOptions(max_new_tokens=40, ignore_eos=True, cancel=cancel)
        with runtime.load(tiny_engine) as engine:
            for maker in (engine, engine.session()):
                done = asyncio.run(maker.agenerate("one two", options=options))
                assert done.finish_reason == "cancelled"
