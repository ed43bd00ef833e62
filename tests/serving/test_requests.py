"""From fields to options, without a server."""

import pytest

from quasar.errors import ContextLimitError, FaultError, GenerationError, PromptError, QueueFullError
from quasar.text.encoding import encode_text
from serving.api_errors import ApiError, answer_to
from serving.api_request import ServedModel, salt_of
from serving.chat_messages import for_template
from serving.chat_request import read_chat_request
from serving.completion_request import read_completion_request
from serving.request_limits import Admission

MODEL = ServedModel(name="m", defaults={"temperature": 0.6, "top_k": 9}, template="", max_length=512)
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return read_chat_request({"model": "m", "messages": MESSAGES, **fields}, MODEL)


def test_the_checkpoints_defaults_stand_for_what_is_not_given():
    assert chat().options == {"temperature": 0.6, "top_k": 9, "max_new_tokens": 512}
    assert chat(temperature=0, top_k=-1).options == {"temperature": 0, "top_k": 0, "max_new_tokens": 512}
    request = read_completion_request({"model": "m", "prompt": "hi"}, MODEL)
    assert request.options == {"temperature": 0.6, "top_k": 9, "max_new_tokens": 16, "chat_template": False}


def test_the_two_names_of_a_limit():
    assert chat(max_tokens=5, max_completion_tokens=5).options["max_new_tokens"] == 5
    with pytest.raises(ApiError, match="differ"):
        chat(max_tokens=5, max_completion_tokens=6)


def test_a_developer_is_the_system_unless_the_template_knows_better():
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "developer"}]
    assert for_template(messages, "{{ message.role }}")[0]["role"] == "system"
    assert for_template(messages, "{% if role == 'developer' %}") == messages


def test_salts():
    assert salt_of({}, "key", 1) is None
    assert salt_of({"user": "a"}, "key", 1) == salt_of({"prompt_cache_key": "a", "user": "b"}, "key", 1) == "key/a"
    assert salt_of({"user": "a"}, "key", 1) != salt_of({"user": "a"}, "other", 1)
    first, second = (salt_of({}, "key", 2) for _ in range(2))
    assert first != second


def test_answers_are_let_in_together_or_not_at_all():
    admission = Admission(most=3)
    admission.take(2)
    with pytest.raises(ApiError) as raised:
        admission.take(2)
    assert raised.value.answer.status == 429
    admission.take(1)
    admission.leave()
    admission.take(1)
    with pytest.raises(ApiError) as raised:
        admission.take(4)
    assert (raised.value.answer.status, raised.value.answer.param) == (400, "n")


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (ContextLimitError("the prompt has 9 tokens"), 400, "messages", "context_length_exceeded"),
        (PromptError("the chat template refuses"), 400, "messages", None),
        (GenerationError("max_new_tokens is 0; 1 or more was expected"), 400, "max_tokens", None),
        (GenerationError("the prompt is empty"), 400, "messages", None),
        (GenerationError("something else"), 400, None, None),
        (QueueFullError("9 requests are under way"), 429, None, "rate_limit_exceeded"),
        (FaultError("a secret of the logits"), 500, None, "internal_error"),
        (ValueError("a secret"), 500, None, "internal_error"),
    ],
    ids=str,
)
def test_errors_of_the_runtime(error, status, param, code):
    answer = answer_to(error, {"max_new_tokens": "max_tokens"}, "messages", 512)
    assert (answer.status, answer.param, answer.code) == (status, param, code)
    assert "secret" not in answer.message
    assert not answer.message.startswith("max_new_tokens")


def test_long_texts_are_encoded_while_other_threads_go_on(tiny_model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))

    class Watched:
        calls = ()

        def __getattr__(self, name):
            self.calls += (name,)
            return getattr(tokenizer, name)

    for text, method in (("short", "encode"), ("long " * 5000, "encode_batch_fast")):
        watched = Watched()
        assert encode_text(watched, text, special_tokens=False) == tokenizer.encode(text, add_special_tokens=False).ids
        assert watched.calls == (method,)
