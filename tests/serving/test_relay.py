"""What of the Ray application needs no Ray: who gets a request, how an answer is passed on, metrics, options."""

import asyncio
import random
import sys

import pytest

from quasar.errors import QuasarError
from serving.api_errors import INTERNAL, ErrorAnswer
from serving.ray import from_config
from serving.ray.affinity import beginning_of, preferred
from serving.ray.application import replica_range
from serving.ray.forwarding import answered, forwarded
from serving.ray.merged_metrics import merged
from serving.ray.relay import LOST, SILENT, Relay, Replicas

USER = {"role": "user", "content": "hello"}
RNG = random.Random(0)


def chat(*messages, **fields):
    return {"messages": list(messages), "prompt_cache_key": "mine", **fields}


def name(body, key="Bearer one", shared=False):
    return beginning_of(body, key, shared=shared)


def test_turns_of_a_conversation_begin_alike():
    system = {"role": "system", "content": "Be brief."}
    first = name(chat(system, USER))
    assert first
    assert name(chat(system, USER, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "x"})) == first
    assert name(chat(system, {"role": "user", "content": [{"type": "text", "text": "hello"}]})) == first
    assert name(chat(USER)) != first


@pytest.mark.parametrize(
    "other",
    [
        chat(USER, prompt_cache_key="another"),
        chat({"role": "user", "content": "hello!"}),
        chat({"role": "system", "content": "hello"}),
        {"prompt": "hello", "cache_salt": "mine"},
    ],
    ids=["cache", "text", "role", "prompt"],
)
def test_other_beginnings(other):
    assert name(other) not in ("", name(chat(USER)))


def test_other_keys_share_nothing():
    assert name(chat(USER)) != name(chat(USER), key="Bearer two")


def test_what_would_not_be_shared_has_no_name():
    assert name({"messages": [USER]}) == ""
    assert name({"messages": [USER]}, shared=True)
    for body in ([], "x", {}, chat(), {"prompt": [], "user": "x"}, {"prompt": 3, "user": "x"}, chat(3), chat(None)):
        assert name(body) == ""


@pytest.mark.parametrize("long", ["x" * 5000, [7] * 5000], ids=["text", "tokens"])
def test_long_prompts_are_told_apart_by_their_beginning(long):
    of = {"user": "one"}
    assert name({"prompt": long, **of}) == name({"prompt": long + long[:1], **of})
    assert name({"prompt": [long], **of}) == name({"prompt": long, **of})
    assert name({"prompt": long[1:] if isinstance(long, str) else [8, *long], **of})


def test_a_beginning_has_one_home():
    loads = dict.fromkeys("abcd", 0)
    homes = {f"{one}": preferred(f"{one}", loads, slots=4, rng=RNG)[0] for one in range(400)}
    # Wherever it is asked for, and in whichever order replicas are known.
    assert all(preferred(one, dict.fromkeys("dcba", 0), slots=4, rng=RNG)[0] == home for one, home in homes.items())
    for replica in "abcd":
        assert 60 < sum(home == [replica] for home in homes.values()) < 140
    # One that goes takes its own along, and no others.
    left = dict.fromkeys("abc", 0)
    assert all(home == preferred(one, left, slots=4, rng=RNG)[0] for one, home in homes.items() if home != ["d"])


def test_a_home_with_too_much_to_do():
    [home], [second], [third] = preferred("x", dict.fromkeys("abc", 0), slots=4, rng=RNG)

    def first(**loads):
        return preferred("x", {home: loads["home"], second: loads["second"], third: 0}, slots=4, rng=RNG)[0]

    assert first(home=3, second=0) == [home]
    assert first(home=4, second=0) == [second]
    assert first(home=4, second=4) == [third]
    # Where all have much to do, a little more is not too much.
    loads = {home: 20, second: 19, third: 18}
    assert preferred("x", loads, slots=4, rng=RNG) == [[home], [second], [third]]
    assert preferred("x", {**loads, home: 30}, slots=4, rng=RNG) == [[second], [third], [home]]


def test_without_a_beginning_two_are_asked():
    groups = [preferred("", dict.fromkeys("abc", 0), slots=4, rng=RNG) for _ in range(50)]
    assert {len(two) for two, _ in groups} == {2}
    assert {one for two, _ in groups for one in two} == set("abc")
    assert all(sorted(two + rest) == ["a", "b", "c"] for two, rest in groups)
    assert preferred("", {"a": 1}, slots=4, rng=RNG)[0] == ["a"]
    assert preferred("x", {}, slots=4, rng=RNG) == []


class LostError(Exception):
    """What a replica that dies raises."""


class FakeStream:
    """Messages of a replica, and what it raises after them."""

    def __init__(self, messages, error=None):
        self._messages, self._error, self.cancelled = list(messages), error, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if self._messages:
            return self._messages.pop(0)
        if isinstance(self._error, Exception):
            raise self._error
        if self._error == "silence":
            await asyncio.Event().wait()
        raise StopAsyncIteration

    def cancel(self):
        self.cancelled = True


def start(kind="application/json"):
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def body(text, more=False):
    return {"type": "http.response.body", "body": text, "more_body": more}


def failure(error) -> ErrorAnswer:
    return LOST if isinstance(error, LostError) else INTERNAL


def relayed(*streams, sent=b'{"prompt": "x", "user": "me"}', leaves=False):
    """(messages that the client gets, beginnings that replicas were called with)."""
    got, called, left = [], [], list(streams)

    def answer(request, beginning):
        assert request.body == sent
        called.append(beginning)
        return left.pop(0)

    async def expositions():
        return [b"# HELP a x\na 1\n"]

    async def run():
        arriving = [{"type": "http.request", "body": sent, "more_body": False}]

        async def receive():
            if arriving:
                return arriving.pop(0)
            if not leaves:
                await asyncio.Event().wait()
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message):
            got.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        relay = Relay(
            Replicas(answer=answer, expositions=expositions, failure=failure),
            max_body_bytes=1000,
            prefix_cache="salted",
        )
        await relay(scope, receive, send)

    asyncio.run(run())
    return got, called


def test_an_answer_is_passed_on():
    got, called = relayed(FakeStream([None, start(), body(b"a", more=True), None, body(b"b")]))
    assert [one.get("body") for one in got] == [None, b"a", b"b"]
    assert called == [name({"prompt": "x", "user": "me"}, key="")]


def test_a_lost_request_goes_to_another_replica():
    """Even where its head had come: nothing was told to the client yet."""
    lost = FakeStream([], LostError()), FakeStream([start()], LostError())
    got, called = relayed(*lost, FakeStream([start(), body(b"a")]))
    assert [one.get("body") for one in got] == [None, b"a"]
    assert len(called) == 3


def test_requests_are_not_given_to_ever_more_replicas():
    got, called = relayed(*[FakeStream([], LostError()) for _ in range(5)])
    assert len(called) == 3
    assert got[0]["status"] == 503
    assert (b"x-should-retry", b"true") in got[0]["headers"]
    assert b"replica_lost" in got[1]["body"]


def test_a_lost_stream_ends_with_an_error():
    begun = [start("text/event-stream"), body(b"data: 1", more=True)]
    [head, first, last], called = relayed(FakeStream(begun, LostError()))
    assert (head["status"], first["body"], len(called)) == (200, b"data: 1", 1)
    assert last["body"].startswith(b'data: {"error":')
    assert b"replica_lost" in last["body"]
    assert not last["more_body"]


def test_a_replica_that_fails_is_the_servers_fault():
    got, called = relayed(FakeStream([], ValueError("x")))
    assert (got[0]["status"], len(called)) == (500, 1)


def test_a_replica_that_says_nothing(monkeypatch):
    monkeypatch.setattr("serving.ray.relay.SILENT_SECONDS", 0.05)
    stream = FakeStream([None], "silence")
    got, _ = relayed(stream)
    assert (got[0]["status"], stream.cancelled) == (503, True)
    assert SILENT.code.encode() in got[1]["body"]


def test_a_client_that_leaves_cancels():
    stream = FakeStream([start("text/event-stream"), body(b"data: 1", more=True)], "silence")
    got, _ = relayed(stream, leaves=True)
    assert stream.cancelled
    assert len(got) == 2


def test_long_bodies_reach_no_replica():
    got, called = relayed(sent=b"x" * 1001)
    assert (got[0]["status"], called) == (413, [])


def test_an_application_is_told_that_nobody_waits():
    told = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"text"
        await send(start())
        told.append((await receive())["type"])

    async def run():
        messages = answered(app, forwarded({"type": "http", "path": "/", "state": object()}, b"text"))
        assert (await anext(messages))["status"] == 200
        await messages.aclose()

    asyncio.run(run())
    assert told == ["http.disconnect"]


def test_pages_of_metrics_become_one():
    metrics = (("a", "counter", 1), ("b", "gauge", 2))
    pages = [
        "".join(
            f'# HELP {name} About {name}.\n# TYPE {name} {kind}\n{name}{{engine="{one}"}} {value}\n'
            for name, kind, value in metrics
        )
        + "# HELP process_x Of this process.\nprocess_x 1\n"
        for one in "xy"
    ]
    assert merged(page.encode() for page in pages).decode().splitlines() == [
        *("# HELP a About a.", "# TYPE a counter", 'a{engine="x"} 1', 'a{engine="y"} 1'),
        *("# HELP b About b.", "# TYPE b gauge", 'b{engine="x"} 2', 'b{engine="y"} 2'),
    ]
    assert merged([]) == b""


@pytest.mark.parametrize(("text", "found"), [("2", (2, 2)), ("1-4", (1, 4))])
def test_how_many_replicas(text, found):
    assert replica_range(text) == found


@pytest.mark.parametrize("text", ["", "-", "a", "1-b", "-3", "1-2-3"])
def test_no_such_replicas(text):
    with pytest.raises(QuasarError, match=r"MIN-MAX or a number was expected, for example 1-4"):
        replica_range(text)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(QuasarError) as raised:
        from_config({"engine_dir": "build/engine"})
    assert str(raised.value) == "ray is not installed: run pip install 'quasar-verifier[serve,ray]'"


def test_a_configuration_needs_an_engine():
    with pytest.raises(QuasarError, match="args lack engine_dir"):
        from_config({})
