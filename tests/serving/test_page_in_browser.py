"""The page in Chromium, against a server process of the tiny engine: chats, what is shown of rounds, keys, errors."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.serving import servers
from tests.serving.browser import MISSING, browsing
from tests.serving.servers import ROOT, running

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

IDLE = "return state.running === null"
ANSWERED = "return state.running === null && state.exchanges.length === {}"
# Set to an engine directory, this makes the pictures in docs/images again.
ENGINE = os.environ.get("QUASAR_PAGE_ENGINE")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def page(browser, server):
    """The page, loaded anew; at the end its console must have been silent."""
    browser.size(1100, 800)
    browser.open(server.url)
    browser.wait("return state.model !== null", "the model is not there")
    browser.log()
    yield browser
    assert browser.log() == []


def chat(page, text, count=1, **settings):
    for name, value in settings.items():
        page.run("byId(arguments[0]).value = arguments[1]", name.replace("_", "-"), value)
    page.run("byId('message').focus()")
    page.type(text, "Enter")
    page.wait(ANSWERED.format(count), "there is no answer")


def answer_to(page, events, text="hi"):
    """Let the page have these events as the server's answer."""
    body = "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in events)
    page.run(
        "window.realFetch ??= window.fetch;"
        "window.fetch = async () => new Response(arguments[0], {headers: {'content-type': 'text/event-stream'}})",
        body,
    )
    chat(page, text)
    page.run("window.fetch = window.realFetch")


def round_of(texts, accepted=0, drafts=(), drafter="none"):
    drafts = [{"token_id": 1, "text": text, "parent": parent, "accepted": kept} for text, parent, kept in drafts]
    return {
        "token_ids": list(range(len(texts))),
        "texts": texts,
        "accepted": accepted,
        "drafts": drafts,
        "drafter": drafter,
        "width": 1 + len(drafts),
        "seconds": 0.01,
        "draft_seconds": 0.001,
    }


def chunk(made, finish=None):
    delta = {"content": "".join(made["texts"])}
    return {"choices": [{"index": 0, "delta": delta, "rounds": [made], "finish_reason": finish}]}


def test_tokens_are_coloured_as_the_rounds_say(page, server):
    chat(page, "abc abc abc", temperature=0, max_tokens=60)
    _, answer = server.chat(
        messages=[{"role": "user", "content": "abc abc abc"}], max_tokens=60, temperature=0, return_rounds=True
    )
    [choice] = answer["choices"]
    assert "".join(page.all_text(".text .token")) == choice["message"]["content"]
    assert page.run("return state.exchanges[0].answer.text") == choice["message"]["content"]
    # How a round is drafted depends on the machine; what it shows, on what the page was told.
    made = page.run("return state.exchanges[0].answer.rounds")
    expected = [
        ["token draft" if place < one["accepted"] else "token own", text]
        for one in made
        for place, text in enumerate(one["texts"])
    ]
    shown = page.run("return [...document.querySelectorAll('.text .token')].map(e => [e.className, e.textContent])")
    assert [[name.replace(" end", ""), text] for name, text in shown] == expected
    assert len(page.all_text(".strip .round")) == len(made)
    accepted, drafted = sum(one["accepted"] for one in made), sum(len(one["drafts"]) for one in made)
    figures = page.text(".figures")
    assert f"{len(expected)} tokens in {len(made) - 1} rounds" in figures
    assert (f"{round(100 * accepted / drafted)} % of drafts" if drafted else "tokens a round") in figures
    assert page.text("#live").strip() == choice["message"]["content"].strip()


def test_rejected_drafts_stand_at_their_place_and_can_be_hidden(page):
    tree = [(" a", -1, True), (" b", 0, True), (" x", 0, False), (" y", 2, False), (" z", -1, False), (" c", 1, False)]
    answer_to(
        page,
        [
            chunk(round_of(["One"])),
            chunk(round_of([" a", " b", " own"], 2, tree, "suffix+recycling"), "length"),
            "[DONE]",
        ],
    )
    parts = page.run("return [...document.querySelector('.text').children].map(e => [e.className, e.textContent])")
    assert parts == [
        ["token own", "One"],
        ["rejected", "z"],
        ["token draft", " a"],
        ["rejected", "x y"],
        ["token draft", " b"],
        ["rejected", "c"],
        ["token own", " own"],
    ]
    assert page.shown(".text .rejected")
    page.click("#shows-rejected")
    assert not page.shown(".text .rejected")
    page.click("#shows-rejected")
    page.click("#colours")
    assert not page.shown(".text .rejected, .speculation")
    page.click("#colours")


def test_a_token_tells_its_round(page):
    answer_to(
        page,
        [
            chunk(round_of(["One"])),
            chunk(round_of([" two", " three"], 1, [(" two", -1, True), (" four", 0, False)], "suffix"), "length"),
            "[DONE]",
        ],
    )
    page.run("document.querySelector('.text .token').focus()")
    assert page.text(".readout").startswith("Prompt: 1 token in 10.0 ms")
    page.type("Right")
    assert page.text(".readout") == (
        "Round 1 · drafter suffix · width 3 · 1 of 2 drafts accepted · 2 tokens in 10.0 msDrafts:  two four "
    )
    assert page.all_text(".text .at") == [" two", "four", " three"]
    page.run("document.querySelector('.strip .round').focus()")
    page.type("End")
    assert page.text(".readout").startswith("Round 1 ")
    assert page.run("return document.activeElement.getAttribute('aria-label')").startswith("Round 1 ")


def test_html_in_an_answer_stays_text(page):
    html = ["<img src=x onerror=alert(1)>", "<script>document.title='bad'</script>", "</p><b>bold</b>"]
    answer_to(
        page,
        [
            chunk(round_of([html[0]])),
            chunk(round_of(html[1:], 1, [(html[1], -1, True), (html[2], 0, False)]), "stop"),
            "[DONE]",
        ],
        text="<i>question</i>",
    )
    assert "".join(page.all_text(".text .token")) == "".join(html)
    assert page.text(".question") == "<i>question</i>"
    assert (
        page.run("return document.querySelectorAll(':is(.text, .question, .readout) :is(img, script, b, i)').length")
        == 0
    )
    assert page.run("return document.title") != "bad"


def test_errors_are_told_and_a_request_can_be_made_again(page):
    error = {"error": {"message": "the <b>server</b> is stopping"}}
    answer_to(page, [chunk(round_of(["One"])), error])
    assert page.text(".error") == "the <b>server</b> is stopping"
    page.run("byId('max-tokens').value = 4")
    page.run("[...document.querySelectorAll('.tools button')].at(-1).click()")
    page.wait("return state.running === null && state.exchanges[0]?.answer.finish", "there is no answer")
    assert not page.shown(".error")
    assert page.run("return state.exchanges.length") == 1


def test_what_the_server_refuses_is_told(page):
    chat(page, "hi", temperature=0, max_tokens=4)
    page.run("state.model.id = 'other'")
    chat(page, "again", 2)
    assert "the model 'other' does not exist" in page.all_text(".error")[1]
    [said] = page.log()
    assert "404" in said


def test_stop(page, server):
    # Read slowly, so that it is still under way whatever this machine's speed is.
    page.run(
        "window.realFetch = window.fetch;"
        "const pause = () => new Promise((go) => setTimeout(go, 2000));"
        "const slowly = { transform: async (part, to) => { to.enqueue(part); await pause(); } };"
        "window.fetch = async (url, options) => { const got = await realFetch(url, options);"
        "  return new Response(got.body.pipeThrough(new TransformStream(slowly)), { status: got.status }); };"
        "byId('max-tokens').value = 400; byId('temperature').value = 1; byId('seed').value = 3"
    )
    page.type("Tell me.", "Enter")
    page.wait("return state.exchanges[0]?.answer.tokens.length > 0", "no token came")
    assert page.shown("#stop")
    assert not page.shown("#send")
    page.type("Escape")
    page.wait(IDLE, "it goes on")
    assert page.text("#status") == "Stopped"
    assert page.run("return state.exchanges[0].answer.finish") is None
    page.run("window.fetch = realFetch")
    page.wait("return !document.querySelector('[aria-busy=true]')", "it looks busy")
    # What was stopped is compared as far as it came.
    page.click(".tools button")
    page.wait(IDLE, "there is no comparison")
    assert page.text(".mark") == "identical: yes"
    deadline = time.monotonic() + 30
    while server.under_way() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.under_way() == 0


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_plain_decoding_gives_the_same_tokens(page, temperature):
    chat(page, "abc abc abc", temperature=temperature, max_tokens=48)
    page.click(".tools button")
    page.wait(IDLE, "there is no comparison")
    assert page.text(".mark") == "identical: yes"
    rounds = page.run("return state.exchanges[0].answer.rounds.length - 1")
    figures = page.all_text(".comparison dd:nth-of-type(even)")
    assert figures[0].endswith(f"tokens/s, {rounds} rounds")
    tokens = page.run("return state.exchanges[0].answer.tokens.length")
    assert figures[1].endswith(f"tokens/s, {tokens - 1} rounds")


def test_a_difference_would_be_told(page):
    chat(page, "abc", temperature=0, max_tokens=12)
    page.run("state.exchanges[0].answer.tokens[4] += 1")
    page.click(".tools button")
    page.wait(IDLE, "there is no comparison")
    assert page.text(".comparison p") == "identical: noToken 5 is the first that differs."


def test_by_keyboard_alone(page):
    """From the message through an answer's tokens, its rounds and the comparison."""
    assert page.focused() == "message"
    page.run("byId('max-tokens').value = 12; byId('temperature').value = 0")
    page.type("one", ("Shift", "Enter"), "two", "Enter")
    page.wait(ANSWERED.format(1), "there is no answer")
    assert page.text(".question") == "one\ntwo"
    assert page.focused() == "message"
    reached = []
    for _ in range(20):
        page.type(("Shift", "Tab"))
        reached.append(page.focused())
        if reached[-1] == "new-chat":
            break
    names = [name.split(" ")[0] for name in reached]
    assert names[-1] == "new-chat"
    for name in ("round", "token", "log", "colours", "shows-rejected"):
        assert name in names, names
    # A walk is one stop, however many tokens there are.
    assert names.count("token") == names.count("round") == 1
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) != "none"
    page.run("document.querySelector('.tools button').focus()")
    page.type("Enter")
    page.wait(IDLE, "there is no comparison")
    page.wait("return document.querySelector('.mark')?.textContent === 'identical: yes'", "it is not told")
    page.run("byId('new-chat').focus()")
    page.type("Enter")
    assert (page.focused(), page.all_text(".answer")) == ("message", [])


def test_settings_reach_the_server(page):
    page.run(
        "window.realFetch = window.fetch;"
        "window.fetch = (url, options) => { window.sent = JSON.parse(options.body); return realFetch(url, options); }"
    )
    chat(page, "hi", system="Be brief.", drafter="suffix", temperature="0.5", max_tokens="5", seed="7")
    chat(page, "more", 2)
    sent = page.run("return window.sent")
    answer = page.run("return state.exchanges[0].answer.text")
    assert (
        sent["messages"]
        == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            *([{"role": "assistant", "content": answer}] if answer else []),
            {"role": "user", "content": "more"},
        ][: len(sent["messages"])]
    )
    assert (sent["drafter"], sent["temperature"], sent["max_tokens"], sent["seed"]) == ("suffix", 0.5, 5, 7)
    assert page.run("return [...byId('drafter').options].map(o => o.value)")[:2] == ["auto", "none"]


@pytest.mark.parametrize("width", [360, 700, 1100])
def test_nothing_is_wider_than_the_window_and_nothing_jumps(page, width):
    page.size(width, 700)
    top = "return byId('composer').getBoundingClientRect().top"
    before = page.run(top)
    chat(page, "abc " * 40, temperature=0, max_tokens=60)
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run("return byId('log').scrollWidth <= byId('log').clientWidth")
    assert page.run(top) == before
    height = "return document.querySelector('.speculation').offsetHeight"
    before = page.run(height)
    page.run("document.querySelectorAll('.text .token')[5].focus()")
    assert page.run(height) == before
    if width < 960:
        assert not page.shown("#settings")
        page.click("#settings-button")
        assert page.shown("#settings")
        page.type("Escape")
        assert not page.shown("#settings")
        assert page.focused() == "settings-button"


def test_a_key_is_asked_for(browser, tiny_engine, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with running(tiny_engine, tmp_path, "--api-key-file", keys, "--threads", 1) as started:
        browser.size(1100, 800)
        browser.open(started.url)
        browser.wait("return document.activeElement.id === 'key'", "no key is asked for")
        assert browser.text("#model") == "This server asks for an API key"
        browser.type("secret", "Enter")
        browser.wait("return state.model !== null", "the key does not help")
        browser.run("byId('max-tokens').value = 4")
        browser.wait("return document.activeElement.id === 'message'", "there is no way on")
        chat(browser, "hi")
        assert browser.run("return state.exchanges[0].answer.finish")
        assert "secret" not in json.dumps(started.lines())
        browser.run("sessionStorage.clear()")
    # Each request without a key.
    assert all("401" in one for one in browser.log())


@pytest.mark.skipif(ENGINE is None, reason="makes pictures: set QUASAR_PAGE_ENGINE to an engine directory")
def test_pictures(browser, tmp_path, monkeypatch):
    # An engine that is new to this machine is measured first.
    monkeypatch.setattr(servers, "PATIENCE", 600)
    images = ROOT / "docs/images"
    images.mkdir(exist_ok=True)
    cache = Path(os.environ.get("QUASAR_PAGE_CACHE", Path.home() / ".cache/quasar-verifier"))
    if cache.is_dir():
        # What is known about this machine.
        shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    with running(ENGINE, tmp_path, "--name", "SmolLM2-135M-Instruct") as started:
        browser.size(1180, 860)
        browser.open(started.url)
        browser.wait("return state.model !== null", "the model is not there")
        chat(browser, PICTURED, temperature=0)
        browser.click(".tools button")
        browser.wait(IDLE, "there is no comparison")
        assert browser.text(".mark") == "identical: yes"
        for name, width, height, scheme in (
            ("light", 1180, 860, "light"),
            ("dark", 1180, 860, "dark"),
            ("narrow", 360, 780, "light"),
        ):
            browser.size(width, height, scheme)
            browser.run(
                "byId('log').scrollTop = arguments[0] ? 150 : byId('log').scrollHeight;"
                "const rounds = [...document.querySelectorAll('.round')];"
                "const mixed = rounds.findLast((one) => one.querySelector('.draft') && one.querySelector('.missed'));"
                "mixed.focus({ preventScroll: true })",
                width < 400,
            )
            time.sleep(0.3)
            picture = images / f"page-{name}.png"
            browser.picture(picture)
            assert picture.stat().st_size < 200_000


PICTURED = "Write the list of weekdays, then the same list again."
