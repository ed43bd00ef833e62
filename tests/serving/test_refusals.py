"""What cannot be honoured is an error in OpenAI's form that names the field; what nobody should send harms nobody."""

import json
import re

import pytest

from quasar.errors import QuasarError
from serving.api_errors import ApiError
from serving.request_limits import read_json
from serving.server import bind
from tests.serving.servers import http_request, running, until

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "x", "parameters": {}}}
# Field, value: of chats and completions.
BOTH = [
    ("metadata", {"a": "b"}),
    ("temprature", 1),
    ("prompt_logprobs", 1),
    ("best_off", 1),
    ("n", 0),
    ("n", 129),
    ("n", 1.5),
    ("n", True),
    ("max_tokens", 0),
    ("max_tokens", "4"),
    ("max_tokens", 10**400),
    ("min_tokens", 1000),
    ("temperature", -0.1),
    ("temperature", 1e-9),
    ("temperature", "hot"),
    ("temperature", [1]),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("seed", 2**64),
    ("seed", "a"),
    ("stop", 3),
    ("stop", ""),
    ("stop", ["a"] * 17),
    ("stop", "x" * 129),
    ("stop", ["<|end|>x"]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [10**6]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"99999": 1}),
    ("logit_bias", [1]),
    ("logit_bias", {str(token): 1 for token in range(1025)}),
    ("ignore_eos", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("priority", 0.5),
    ("user", ""),
    ("user", "x" * 513),
    ("cache_salt", 1),
    ("return_token_ids", 1),
]
CHAT = [
    ("tools", [TOOL]),
    ("tool_choice", "auto"),
    ("parallel_tool_calls", True),
    ("functions", [{}]),
    ("function_call", "auto"),
    ("prediction", "x"),
    ("prediction", {"type": "text", "content": "x"}),
    ("prediction", {"type": "content"}),
    ("prediction", {"content": "x"}),
    ("prediction", {"type": "content", "content": 3}),
    ("prediction", {"type": "content", "content": [{"type": "image_url", "image_url": {}}]}),
    ("prediction", {"type": "content", "content": "x" * 100_000}),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x"}),
    ("store", True),
    ("service_tier", "flex"),
    ("reasoning_effort", "low"),
    ("verbosity", "low"),
    ("web_search_options", {}),
    ("moderation", {"model": "x"}),
    ("prompt_cache_options", {"mode": "explicit"}),
    ("prompt_cache_retention", "24h"),
    ("logprobs", 2),
    ("top_logprobs", 2),
    ("max_completion_tokens", 0),
    ("chat_template_kwargs", "x"),
    ("add_generation_prompt", False),
    ("continue_final_message", 1),
    ("safety_identifier", 3),
    ("echo", True),
    ("prompt", "x"),
    ("messages", []),
    ("messages", "hi"),
]
COMPLETION = [
    ("suffix", "x"),
    ("best_of", 2),
    ("logprobs", True),
    ("logprobs", 21),
    ("echo", "x"),
    ("tools", [TOOL]),
    ("messages", [USER]),
    ("prompt", []),
    ("prompt", ""),
    ("prompt", {"a": 1}),
    ("prompt", [[1], 2]),
    ("prompt", [1.5]),
    ("prompt", [-1]),
    ("prompt", [10**6]),
    ("prompt", [10**30]),
    ("prompt", ["a"] * 129),
]
MESSAGES = [
    ("messages[0]", "hi"),
    ("messages[0].role", {"content": "hi"}),
    ("messages[0].role", {"role": "king", "content": "hi"}),
    ("messages[0].content", {"role": "user"}),
    ("messages[0].content", {"role": "user", "content": 3}),
    ("messages[0].content[0]", {"role": "user", "content": ["hi"]}),
    (
        "messages[0].content[0].type",
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]},
    ),
    (
        "messages[0].content[1].type",
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]},
    ),
    ("messages[0].content[0].text", {"role": "user", "content": [{"type": "text"}]}),
    (
        "messages[0].content[0].cache_control",
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
    ),
    ("messages", {"role": "user", "content": "hi", "name": "Ada"}),
    ("messages", {"role": "user", "content": "\ud800"}),
]


def refused(found, status=400):
    """The error object of an answer."""
    assert found[0] == status, found
    error = found[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(("name", "value"), [*BOTH, *CHAT], ids=lambda value: repr(value)[:30])
def test_fields_of_chats(server, name, value):
    assert re.split(r"[.[]", refused(server.chat(**{name: value}))["param"])[0] == name


@pytest.mark.parametrize(("name", "value"), [*BOTH, *COMPLETION], ids=lambda value: repr(value)[:30])
def test_fields_of_completions(server, name, value):
    param = refused(server.completion(**{name: value}))["param"]
    assert param.split("[")[0] == name


@pytest.mark.parametrize(("param", "message"), MESSAGES, ids=lambda value: repr(value)[:40])
def test_messages(server, param, message):
    assert refused(server.chat(messages=[message]))["param"] == param


def test_what_asks_for_what_is_done_anyway_may_stand(server):
    status, _ = server.chat(
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        modalities=["text"],
        store=False,
        service_tier="auto",
        metadata={},
        prediction=None,
        logprobs=None,
        stop=None,
        safety_identifier="someone",
    )
    assert status == 200
    until(lambda: server.lines()[-1].get("user") == "someone", "it is not in the log")
    status, _ = server.chat(stream=True, stream_options={"include_obfuscation": False})
    assert status == 200


def test_fields_that_are_missing(server):
    for path, body in (("chat/completions", {"messages": [USER]}), ("completions", {"prompt": "hi"})):
        assert refused(server.post(f"/v1/{path}", body)[:2])["param"] == "model"
        assert refused(server.post(f"/v1/{path}", {"model": server.name})[:2])["param"] in ("messages", "prompt")


def test_paths_and_methods(server):
    assert refused(server.request("GET", "/nowhere")[:2], 404)["code"] == "unknown_url"
    refused(server.request("POST", "/")[:2], 405)
    refused(server.request("GET", "/v1/chat/completions")[:2], 405)
    refused(server.request("DELETE", "/v1/models")[:2], 405)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe{}",
        b'{"model": "tiny", "temperature": NaN}',
        b'{"model": "tiny", "temperature": Infinity}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"temperature": 1e999}',
        b'{"\\u0000": 1}',
        b'{"' + b"x" * 100_000 + b'": 1}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bodies_that_are_no_requests(server, body):
    error = refused(server.request("POST", "/v1/chat/completions", raw=body)[:2])
    assert len(error["message"]) < 500


def test_a_million_stop_strings(server):
    assert refused(server.chat(stop=["a"] * 1_000_000), 413)["code"] == "request_too_large"
    assert refused(server.chat(stop=["a"] * 500_000))["param"] == "stop"


def test_prompts_that_surely_do_not_fit_are_not_tokenized(server):
    error = refused(server.chat(messages=[{"role": "user", "content": "x " * 1_000_000}]))
    assert error["code"] == "context_length_exceeded"
    assert "characters" in error["message"]


def test_template_arguments(server):
    error = refused(server.chat(chat_template_kwargs={"enable_thinking": False}))
    assert "enable_thinking" in error["message"]
    refused(server.chat(chat_template_kwargs={"messages": []}))


def test_media_types(server):
    body = json.dumps({"model": server.name, "prompt": "hi"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        found = server.request("POST", "/v1/completions", raw=body, headers={"content-type": kind})
        refused(found[:2], 415)


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx : y\r\n\r\n", 400),
        # Two lengths; a length beside chunks of which a proxy may have read the other.
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 50_000, 431),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_requests_that_are_none(server, request_bytes, status):
    answer = server.send(request_bytes)
    assert status_of(answer) == status
    error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    assert error["type"] == "invalid_request_error"


def test_one_bad_request_takes_no_other_down(server):
    """In the middle of an answer, everything above once more."""
    client = server.stalled_stream()
    for body in (b"{", b"\xff", b"[" * 100_000):
        server.request("POST", "/v1/chat/completions", raw=body)
    server.send(b"nonsense\r\n\r\n")
    server.send(http_request("/v1/completions", b"{}")[:-1])
    assert server.chat()[0] == 200
    text = b""
    while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        part = client.recv(65536)
        assert part
        text += part
    client.close()
    assert server.request("GET", "/health")[0] == 200
    assert server.process.poll() is None


def test_what_was_sent_is_not_in_the_log(server):
    before = len(server.lines())
    for body in ({"messages": "a secret"}, {"messages": [USER], "stop": ["a secret" * 40]}):
        status, answer, _ = server.post("/v1/chat/completions", {"model": server.name, **body})
        assert (status, "a secret" in answer["error"]["message"]) == (400, True)
    until(lambda: len(server.lines()) >= before + 2, "the log has no line for each request")
    lines = server.lines()[before:]
    assert [line["error"] for line in lines if "error" in line] == [
        "messages: invalid_value",
        "stop[0]: invalid_value",
    ]
    assert "a secret" not in json.dumps(lines)


def test_names_of_requests(server):
    assert server.request("GET", "/health", headers={"x-request-id": "abc-1/2"})[2]["x-request-id"] == "abc-1/2"
    # Nothing that could break a line of a log or a header.
    given = 'a"b\\c d\te' + "f" * 500
    kept = server.request("GET", "/health", headers={"x-request-id": given})[2]["x-request-id"]
    assert kept == ("abcde" + "f" * 500)[: len(kept)]
    assert 100 < len(kept) <= 128
    first, second = (server.request("GET", "/health")[2]["x-request-id"] for _ in range(2))
    assert first != second
    until(lambda: server.lines()[-1].get("request_id") == second, "it is not in the log")


@pytest.fixture(scope="module")
def guarded(tiny_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text("# for tests\nfirst-key\n\nsecond-key\n")
    options = ["--api-key-file", folder / "keys", "--max-body-bytes", 5000, "--max-tokens-limit", 6]
    options += ["--cors-origin", "https://page.example", "--name", "ours", "--queue-limit", 1, "--slots", 1]
    with running(tiny_engine, folder, *options, "--threads", 1) as started:
        yield started


KEY = {"authorization": "Bearer second-key"}


def test_keys(guarded):
    body = {"model": "ours", "messages": [USER], "temperature": 0, "max_tokens": 2}
    for header in (None, "Bearer ", "Bearer first-ke", "Bearer first-keyy", "Basic first-key", "Bearer # for tests"):
        headers = {} if header is None else {"authorization": header}
        status, answer, told = guarded.post("/v1/chat/completions", body, headers)
        assert refused((status, answer), 401)["code"] == "invalid_api_key"
        assert told["www-authenticate"] == "Bearer"
        assert guarded.request("GET", "/v1/models", headers=headers)[0] == 401
        assert guarded.request("GET", "/v1/models/ours", headers=headers)[0] == 401
    for key in ("first-key", "second-key"):
        assert guarded.post("/v1/chat/completions", body, {"authorization": f"bearer {key}"})[0] == 200
    assert "-key" not in guarded.log.read_text()
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert guarded.request("GET", path)[0] == 200


def test_keys_do_not_share_a_cache(guarded):
    body = {"model": "ours", "prompt": "a rather long beginning " * 8, "user": "same", "max_tokens": 1}

    def reused(key):
        answer = guarded.post("/v1/completions", body, {"authorization": f"Bearer {key}"})[1]
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert reused("first-key") == 0
    assert reused("second-key") == 0


def test_long_bodies(guarded):
    body = json.dumps({"model": "ours", "prompt": "x" * 6000}).encode()
    found = guarded.request("POST", "/v1/completions", raw=body, headers=KEY)
    assert refused(found[:2], 413)["code"] == "request_too_large"
    # Before the body has come.
    request = http_request("/v1/completions", b"", "authorization: Bearer first-key")
    assert status_of(guarded.send(request.replace(b"content-length: 0", b"content-length: 99999999"))) == 413
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += b"authorization: Bearer first-key\r\ntransfer-encoding: chunked\r\n\r\n"
    assert status_of(guarded.send(head + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 6)) == 413


def test_limits_of_answers(guarded):
    def asked(**fields):
        return guarded.post("/v1/completions", {"model": "ours", "prompt": "a", **fields}, KEY)[:2]

    assert refused(asked(max_tokens=7))["param"] == "max_tokens"
    assert asked()[1]["usage"]["completion_tokens"] <= 6
    assert refused(asked(n=3))["param"] == "n"


def test_cors(guarded, server):
    # Those of OpenAI's client in a page, a few of them.
    sent = "authorization,content-type,x-stainless-lang,x-stainless-os,x-stainless-retry-count"
    ask = {"access-control-request-method": "POST", "access-control-request-headers": sent}
    good, bad = ({**ask, "origin": origin} for origin in ("https://page.example", "https://other.example"))
    found = guarded.request("OPTIONS", "/v1/completions", headers=good)
    assert (found[0], found[2]["access-control-allow-origin"]) == (200, "https://page.example")
    assert set(sent.split(",")) <= set(found[2]["access-control-allow-headers"].replace(" ", "").split(","))
    for to, headers in ((guarded, bad), (server, good)):
        assert "access-control-allow-origin" not in to.request("OPTIONS", "/v1/completions", headers=headers)[2]
        assert "access-control-allow-origin" not in to.request("GET", "/health", headers=headers)[2]


def test_an_address_that_is_taken_is_an_error(server):
    host, port = server.address
    with pytest.raises(QuasarError, match=f"cannot listen at {host} port {port}"):
        bind(host, port)


def test_a_body_that_is_nested_deeply_is_refused():
    def nested(levels):
        return f'{{"tools": {"[" * levels}{"]" * levels}}}'.encode()

    assert read_json(nested(90)) is not None
    for levels in (100, 600, 100_000):
        with pytest.raises(ApiError) as caught:
            read_json(nested(levels))
        assert caught.value.answer.status == 400
        assert caught.value.answer.message == "the body is nested too deeply"
