"""Every option that cannot be honoured is an error that says what came and what was expected."""

import math
import threading

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime.options import GenerationOptions, make_options


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
