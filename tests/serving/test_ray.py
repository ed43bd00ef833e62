"""A cluster of Ray's on this machine, with two replicas: exactness, a replica that dies, affinity, limits, the end.

`make test-ray` runs this in an environment that has Ray. QUASAR_RAY_ENGINE names an engine to take instead of the tiny
one.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import runtime
from tests.serving.servers import ROOT, RunningServer, http_request

pytest.importorskip("ray", reason="Ray is not installed: make test-ray")

# Ray starts a dozen processes, and replicas load and time their engines: minutes on a busy machine.
STARTS, PATIENCE = 400, 180
REPLICAS, SLOTS, QUEUE = 2, 4, 8


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def ray_server(engine, *options):
    # Paths of sockets below it have a hundred characters at most; Ray keeps a token in the home folder.
    folder = Path(tempfile.mkdtemp(prefix="quasar-ray", dir="/tmp"))
    variables = {"HOME": str(folder), "RAY_TMPDIR": str(folder), "QUASAR_CACHE": str(folder / "cache")}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "serving", "serve", str(engine), "--ray", "--port", str(free_port())]
    log, out = folder / "log", folder / "out"
    with log.open("w") as errors, out.open("w") as output:
        process = subprocess.Popen(
            [*command, *map(str, options)],
            stdout=output,
            stderr=errors,
            cwd=ROOT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + STARTS
        while " is served at " not in out.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        [line] = [line for line in out.read_text().splitlines() if " is served at " in line]
        name, _, url = line.partition(" is served at ")
        yield RunningServer(process=process, url=url, name=name, log=log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_engine(request):
    given = os.environ.get("QUASAR_RAY_ENGINE")
    return Path(given) if given else request.getfixturevalue("tiny_engine")


@pytest.fixture(scope="module")
def service(ray_engine):
    limits = ("--slots", SLOTS, "--queue-limit", QUEUE, "--threads", 1)
    with ray_server(ray_engine, "--replicas", REPLICAS, *limits) as started:
        yield started


@pytest.fixture(scope="module")
def alone(ray_engine):
    with runtime.load(ray_engine, threads=1, max_sequences=SLOTS) as loaded:
        yield loaded


def lines(service):
    """(process, line) of every request that a replica has logged."""
    found = re.findall(r"ServeReplica:quasar:Engine pid=(\d+)\)\S* (\{.*\})", service.log.read_text())
    return [(int(pid), json.loads(line)) for pid, line in found]


def replica_of(service, name):
    """The process that answered a request with this name."""
    answered = []

    def is_there():
        answered[:] = [pid for pid, line in lines(service) if line.get("request_id") == name]
        return bool(answered)

    until(is_there, "the request was not logged")
    return answered[0]


def engines(service):
    """Names of the replicas that tell their metrics."""
    return set(re.findall(r'^quasar:slots\{engine="(\w+)"', service.request("GET", "/metrics")[1], re.MULTILINE))


def total(service, name):
    """A metric's sum over the replicas."""
    text = service.request("GET", "/metrics")[1]
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def post(service, body, **headers):
    """(status, object or events, headers); a connection that breaks off raises."""
    connection = http.client.HTTPConnection(*service.address, timeout=PATIENCE)
    with contextlib.closing(connection):
        data = json.dumps({"model": service.name, **body}).encode()
        connection.request(
            "POST", "/v1/chat/completions", data, {"content-type": "application/json", "connection": "close", **headers}
        )
        response = connection.getresponse()
        text = response.read().decode()
    told = {name.lower(): value for name, value in response.getheaders()}
    if told["content-type"].startswith("text/event-stream"):
        return response.status, [one.removeprefix("data: ") for one in text.split("\n\n") if one[:5] == "data:"], told
    return response.status, json.loads(text), told


def asked(number):
    """A request and the options that give its answer in this process."""
    messages = [{"role": "user", "content": f"Number {number}: say something of it. abc abc {number}"}]
    sampling = {"temperature": 0} if number % 3 else {"temperature": 0.9, "top_p": 0.95, "seed": number}
    body = {"messages": messages, "max_tokens": 24 + number % 9, "return_token_ids": True, **sampling}
    return {**body, "stream": number % 2 == 1}, messages, {"max_new_tokens": body["max_tokens"], **sampling}


def token_ids(status, answer):
    """The tokens of a whole answer; None of one that ended with an error that asks to try again."""
    if isinstance(answer, list):
        *events, last = answer
        if last != "[DONE]":
            assert json.loads(last)["error"]["code"] == "replica_lost"
            return None
        return [one for event in events for one in json.loads(event)["choices"][0].get("token_ids", ())]
    if status == 200:
        return answer["choices"][0]["token_ids"]
    assert (status, answer["error"]["code"]) == (503, "replica_lost")
    return None


def expected(alone, number):
    _, messages, options = asked(number)
    return [*alone.generate(messages, **options).token_ids]


def at_once(work, values, threads=8):
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, values))


def test_sixty_answers_are_the_engines(service, alone):
    answers = at_once(lambda number: post(service, asked(number)[0])[:2], range(60))
    assert {status for status, _ in answers} == {200}
    for number, answer in enumerate(answers):
        assert token_ids(*answer) == expected(alone, number), number
    assert len({pid for pid, line in lines(service) if line.get("status") == 200}) == REPLICAS


def test_a_stream_comes_in_steps(service):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "ignore_eos": True, "stream": True}
    _, events, headers = post(service, body)
    assert len(events) > 10
    assert headers["cache-control"] == "no-cache"


def test_errors_come_as_they_are(service):
    status, answer, _ = post(service, {"messages": [], "max_tokens": 4})
    assert (status, answer["error"]["param"]) == (400, "messages")
    status, answer, _ = post(service, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0})
    assert (status, answer["error"]["param"]) == (400, "max_tokens")
    status, answer, _ = service.request("GET", "/v1/nothing")
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    assert service.request("POST", "/v1/completions", raw=b"{" * 5 * 2**20)[0] == 413
    assert service.request("GET", "/ready")[:2] == (200, {"status": "ready"})


def test_a_request_keeps_its_name(service):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    _, _, headers = post(service, body, **{"x-request-id": "its-own-name"})
    assert headers["x-request-id"] == "its-own-name"
    assert replica_of(service, "its-own-name")


def test_turns_of_a_conversation_stay_on_a_replica(service):
    """12 conversations; the odds that all are on one replica are one to two thousand."""

    def turn(conversation, number, messages):
        name = f"conversation-{conversation}-{number}"
        body = {"messages": messages, "max_tokens": 12, "temperature": 0, "prompt_cache_key": f"key-{conversation}"}
        status, answer, _ = post(service, body, **{"x-request-id": name})
        assert status == 200
        return replica_of(service, name), answer

    homes = {}
    talks = {one: [{"role": "user", "content": f"Conversation {one} begins here."}] for one in range(12)}
    for one, messages in talks.items():
        for number in range(3):
            home, answer = turn(one, number, messages)
            assert homes.setdefault(one, home) == home
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached > 0 if number else cached == 0
            messages += [{"role": "assistant", "content": answer["choices"][0]["message"]["content"] or "x"}]
            messages += [{"role": "user", "content": f"And turn {number}?"}]
    assert len(set(homes.values())) == REPLICAS


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_slots(service, stream):
    aborted, tokens = total(service, "vllm:request_success_total"), total(service, "vllm:generation_tokens_total")
    body = {"model": service.name, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    body |= {"n": 12, "max_tokens": 400, "ignore_eos": True, "temperature": 1}
    with socket.create_connection(service.address) as client:
        client.sendall(http_request("/v1/chat/completions", json.dumps(body).encode()))
        until(lambda: total(service, "vllm:generation_tokens_total") > tokens, "no token came")
    until(lambda: total(service, "vllm:num_requests_running") == 0, "the answers go on")
    until(lambda: total(service, "quasar:slots_used") == 0, "slots are used")
    assert total(service, "vllm:request_success_total") == aborted + 12
    assert total(service, "vllm:generation_tokens_total") < tokens + 12 * 400


def test_full_queues(service):
    """12 answers are let in by each replica; what is more is refused, in the replica's words."""
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 12, "max_tokens": 60, "ignore_eos": True}
    answers = at_once(lambda _: post(service, body), range(16), threads=16)
    refused = [
        (answer["error"]["code"], headers["retry-after"]) for status, answer, headers in answers if status == 429
    ]
    assert {status for status, _, _ in answers} == {200, 429}
    assert set(refused) == {("rate_limit_exceeded", "1")}
    assert [status for status, _, _ in answers].count(200) >= REPLICAS


def whole_again(service, before):
    until(lambda: len(engines(service)) == REPLICAS and engines(service) != before, "there is no new replica")


def test_a_stream_whose_replica_dies(service):
    before = engines(service)
    body = {"model": service.name, "messages": [{"role": "user", "content": "hi"}], "prompt_cache_key": "its home"}
    assert post(service, {**body, "max_tokens": 1}, **{"x-request-id": "before-it-dies"})[0] == 200
    victim = replica_of(service, "before-it-dies")
    body |= {"stream": True, "n": 12, "max_tokens": 400, "ignore_eos": True, "temperature": 1}
    connection = http.client.HTTPConnection(*service.address, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b'data: {"id"')
        os.kill(victim, signal.SIGKILL)
        *_, last = response.read().decode().strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    whole_again(service, before)


def test_a_replica_that_dies(service, alone):
    """Each request is answered exactly, or told to come again; none waits for ever; then there are two again."""
    before = engines(service)
    assert len(before) == REPLICAS
    assert post(service, asked(0)[0], **{"x-request-id": "says-who-lives"})[0] == 200
    victim = replica_of(service, "says-who-lives")
    done = []

    def one(number):
        begun = time.monotonic()
        answer = post(service, asked(number)[0])[:2]
        done.append(number)
        if len(done) == 12:
            os.kill(victim, signal.SIGKILL)
        return answer, time.monotonic() - begun

    answers = at_once(one, range(60))
    lost = 0
    for number, (answer, seconds) in enumerate(answers):
        found = token_ids(*answer)
        lost += found is None
        assert found is None or found == expected(alone, number), number
        assert seconds < PATIENCE
    # At most what the dead one had: streams that had begun.
    assert lost <= 8
    print(f"{lost} of 60 were told to come again")
    whole_again(service, before)
    again = at_once(lambda number: post(service, asked(number)[0])[:2], range(16))
    assert [token_ids(*answer) for answer in again] == [expected(alone, number) for number in range(16)]
    assert {pid for pid, line in lines(service)[-16:]} - {victim}


def test_a_stop_lets_answers_come_to_their_end(service):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        tokens = total(service, "vllm:generation_tokens_total")
        answer = pool.submit(post, service, body)
        until(lambda: total(service, "vllm:generation_tokens_total") > tokens, "no token came")
        service.process.send_signal(signal.SIGTERM)
        assert answer.result()[1][-1] == "[DONE]"
    assert service.process.wait(PATIENCE) == 0
