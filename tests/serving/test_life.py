"""Clients that leave or stall, queues that are full, time that is over, and how a server ends."""

import json
import signal
import socket
import time

import pytest

from quasar.errors import QuasarError
from serving.keys import read_keys
from serving.server import bind
from serving.settings import ServerSettings
from tests.serving.servers import PATIENCE, http_request, running, until

LONG = {"n": 12, "max_tokens": 480, "ignore_eos": True, "temperature": 1}


def request_bytes(server, **fields):
    body = {"model": server.name, "messages": [{"role": "user", "content": "hi"}], **fields}
    return http_request("/v1/chat/completions", json.dumps(body).encode())


@pytest.fixture(autouse=True)
def _room(request):
    """The answers of the test before are over for good."""
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        until(lambda: server.chat(n=12, max_tokens=1)[0] == 200, "there is no room")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_its_answers(server, stream):
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    tokens = server.metric("vllm:generation_tokens_total")
    with socket.create_connection(server.address) as client:
        client.sendall(request_bytes(server, stream=stream, **LONG))
        until(lambda: server.metric("vllm:generation_tokens_total") > tokens, "no token came")
    until(lambda: server.under_way() == 0, "the answers go on")
    until(
        lambda: server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 12,
        "they were not counted",
    )
    assert server.metric("vllm:generation_tokens_total") < tokens + 12 * 480


def test_a_full_queue(server):
    """12 answers are let in, of which 4 have slots; those of one request together or not at all."""
    client = server.stalled_stream(n=11)
    status, answer, headers = server.post(
        "/v1/chat/completions", {"model": server.name, "messages": [{"role": "user", "content": "hi"}], "n": 2}
    )
    assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    assert server.chat()[0] == 200
    client.close()
    until(lambda: server.chat(n=2)[0] == 200, "there is no room again")


def test_a_client_that_reads_nothing_stalls_nobody(server):
    clients = [server.stalled_stream() for _ in range(8)]
    tokens = []

    def stands_still():
        tokens.append(server.metric("vllm:generation_tokens_total"))
        time.sleep(0.2)
        return tokens[-1] == server.metric("vllm:generation_tokens_total")

    # All eight share four slots: one whose client stalls gives its own up.
    until(stands_still, "the answers go on")
    assert server.under_way() == 8
    memory = server.metric("process_resident_memory_bytes")
    for _ in range(5):
        assert server.chat(max_tokens=60)[0] == 200
    assert server.under_way() == 8
    # What is unread is bounded: a few steps and a socket's buffers for each.
    assert server.metric("process_resident_memory_bytes") < memory + 16 * 2**20
    for client in clients:
        client.close()
    until(lambda: server.under_way() == 0, "the answers go on")


def test_a_half_sent_request_stalls_nobody(server):
    with socket.create_connection(server.address) as client:
        client.sendall(http_request("/v1/completions", b"x" * 100)[:-50])
        assert server.chat()[0] == 200


def test_metrics_and_the_log_count_what_was_done(server):
    before = server.metrics()
    status, answer = server.chat(max_tokens=30, ignore_eos=True, temperature=0)
    assert status == 200
    after = server.metrics()

    def more(name, **labels):
        key = (name, *sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    usage = answer["usage"]
    assert more("vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert more("vllm:generation_tokens_total") == usage["completion_tokens"] == 30
    assert more("vllm:request_success_total", finished_reason="length") == 1
    for name in (
        *("vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds", "vllm:request_prompt_tokens"),
        *("vllm:request_time_per_output_token_seconds", "quasar:acceptance_length", "quasar:request_wait_seconds"),
    ):
        assert more(f"{name}_count") == 1
    assert more("vllm:spec_decode_num_draft_tokens_total") >= more("vllm:spec_decode_num_accepted_tokens_total")
    rounds = {key: value - before.get(key, 0) for key, value in after.items() if key[0] == "quasar:rounds_total"}
    tokens = {key: value - before.get(key, 0) for key, value in after.items() if key[0] == "quasar:round_tokens_total"}
    assert sum(tokens.values()) == 29
    assert more("vllm:inter_token_latency_seconds_count") == sum(rounds.values())
    assert 0 <= after[("vllm:kv_cache_usage_perc",)] <= 1
    assert more("quasar:http_responses_total", path="/v1/chat/completions", status="200") == 1
    line = [one for one in server.lines() if one.get("path") == "/v1/chat/completions"][-1]
    assert (line["status"], line["completion_tokens"], line["finish_reasons"]) == (200, 30, ["length"])
    assert line["first_token_seconds"] <= line["seconds"]
    assert line["acceptance_length"] == pytest.approx(29 / sum(rounds.values()), abs=1e-3)


def test_time_that_is_over(tiny_engine, tmp_path):
    options = ["--timeout", 0.2, "--slots", 2, "--threads", 1, "--host", "0.0.0.0"]
    with running(tiny_engine, tmp_path, *options) as server:
        [warning] = server.lines()
        assert (warning["level"], "without keys" in warning["message"]) == ("warning", True)
        status, answer, headers = server.post(
            "/v1/chat/completions",
            {"model": server.name, "messages": [{"role": "user", "content": "hi"}], **LONG, "n": 60},
        )
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert headers["x-should-retry"] == "false"
        until(lambda: server.under_way() == 0, "the answers go on")
        streamed = server.post(
            "/v1/chat/completions",
            {"model": server.name, "messages": [{"role": "user", "content": "hi"}], **LONG, "n": 60, "stream": True},
        )
        assert streamed[0] == 200
        last = streamed[1].strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        until(lambda: server.under_way() == 0, "the answers go on")
        assert server.chat()[0] == 200


def test_a_stop_lets_answers_come_to_their_end(tiny_engine, tmp_path):
    with running(tiny_engine, tmp_path, "--drain-seconds", PATIENCE, "--threads", 1) as server:
        client = server.stalled_stream()
        assert server.request("GET", "/ready")[:2] == (200, {"status": "ready"})
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.request("GET", "/ready")[0] == 503, "it is still ready")
        assert server.request("GET", "/health")[0] == 200
        status, answer, headers = server.post("/v1/chat/completions", {})
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "server_stopping", "1")
        text = b""
        while part := client.recv(65536):
            text += part
        client.close()
        assert b"data: [DONE]" in text
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("twice", [False, True], ids=["time is over", "told twice"])
def test_a_stop_is_bounded(tiny_engine, tmp_path, twice):
    with running(tiny_engine, tmp_path, "--drain-seconds", PATIENCE if twice else 0.3, "--threads", 1) as server:
        client = server.stalled_stream()
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        if twice:
            until(lambda: server.request("GET", "/ready")[0] == 503, "it is still ready")
            server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0
        # The answer would never end: nobody reads it. A third of what the drain may take when told twice.
        assert time.monotonic() - begun < PATIENCE / 3
        client.close()


def test_killed_and_started_again(tiny_engine, tmp_path):
    """Nothing is left that a new one would trip over, the port least of all."""
    answers = []
    port = 0
    for _ in range(2):
        with running(tiny_engine, tmp_path, "--port", port, "--threads", 1) as server:
            port = server.address[1]
            answers.append(server.chat(temperature=0, max_tokens=12)[1]["choices"])
            client = server.stalled_stream()
            server.process.kill()
            server.process.wait()
            client.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeout", 0], "timeout is 0.0; seconds, more than 0, were expected"),
        (["--slots", 0], "max_sequences is 0; 1 or more was expected"),
    ],
    ids=["server", "engine"],
)
def test_what_cannot_be_served_is_one_line(tiny_engine, tmp_path, options, message):
    with pytest.raises(AssertionError), running(tiny_engine, tmp_path, *options):
        pass
    assert (tmp_path / "log").read_text() == f"error: {message}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue_limit": -1}, "queue_limit is -1; 0 or more was expected"),
        ({"max_tokens_limit": 0}, "max_tokens_limit is 0; 1 or more was expected"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0; 1 or more was expected"),
        ({"drain_seconds": -1.0}, "drain_seconds is -1.0; 0 or more was expected"),
        ({"drain_seconds": float("nan")}, "drain_seconds is nan; 0 or more was expected"),
        ({"timeout": float("nan")}, "timeout is nan; seconds, more than 0, were expected"),
        ({"name": "a\nb"}, "name is 'a\\nb'; printable characters, 200 at most, were expected"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(QuasarError) as raised:
        ServerSettings(**settings)
    assert str(raised.value) == message


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 99999), ("no.such.host.invalid", 0), ("192.0.2.1", 0)])
def test_addresses_that_cannot_be_had(host, port):
    with pytest.raises(QuasarError, match=f"cannot listen at {host} port {port}"):
        bind(host, port)


def test_key_files(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufeffone\n  two  \n#three\n", encoding="utf-8")
    keys = read_keys(path)
    assert keys.keys == (b"one", b"two")
    assert "one" not in repr(keys)
    assert keys.holder("Bearer one") != keys.holder("Bearer two")
    for text in ("", "# only\n", "with space\n", "schlüssel\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(QuasarError, match="--api-key-file"):
            read_keys(path)
