"""The page at `/` as a file and over HTTP: whole by itself, closed to everything else, and each control has a name."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from serving.settings import ServerSettings
from tests.serving.servers import ROOT, running

FILE = ROOT / "serving/page.html"
PAGE = FILE.read_text(encoding="utf-8")
VOID = {"meta", "link", "input", "br"}
CONTROLS = {"button", "input", "select", "textarea"}


class Reader(HTMLParser):
    """Every element with its attributes and its text; wrong nesting is an error."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        element = {"tag": tag, "attributes": dict(attrs), "text": "", "inside": [one["tag"] for one in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> ends nothing"
        assert self.open.pop()["tag"] == tag, f"</{tag}> ends something else"

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data


@pytest.fixture(scope="module")
def elements():
    return Reader(PAGE).elements


def test_it_is_well_formed_and_names_are_used_once(elements):
    assert PAGE.startswith("<!doctype html>")
    ids = [one["attributes"]["id"] for one in elements if "id" in one["attributes"]]
    assert len(set(ids)) == len(ids)
    for one in elements:
        for name in ("for", "aria-controls", "aria-describedby"):
            assert one["attributes"].get(name, ids[0]) in ids
    assert set(re.findall(r'byId\("([\w-]+)"\)', PAGE)) <= set(ids)


def test_every_control_has_a_label(elements):
    labelled = {one["attributes"].get("for") for one in elements if one["tag"] == "label" and one["text"].strip()}
    controls = [one for one in elements if one["tag"] in CONTROLS]
    assert len(controls) > 10
    for one in controls:
        inside = "label" in one["inside"]
        assert inside or one["text"].strip() or one["attributes"].get("id") in labelled, one


def test_it_needs_nothing_beside_itself(elements):
    # XML's name for SVG is no address that is asked.
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", PAGE) == ["http://www.w3.org"]
    for one in elements:
        for name in ("src", "href", "action", "srcset", "data"):
            value = one["attributes"].get(name)
            assert value is None or (one["tag"] == "link" and value.startswith("data:image/svg+xml,"))
        assert not [name for name in one["attributes"] if name.startswith("on") or name == "style"]
    assert "@import" not in PAGE
    assert "url(" not in PAGE
    assert set(re.findall(r'fetch\("([^"]*)"', PAGE)) == {"v1/models", "version", "v1/chat/completions"}


def test_nothing_becomes_html():
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "cookie"):
        assert sink not in PAGE


def test_headers(server):
    status, body, headers = server.request("GET", "/")
    assert (status, body) == (200, PAGE)
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for element in ("script", "style"):
        [content] = re.findall(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{element}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_it_needs_no_key_and_can_be_left_out(tiny_engine, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with running(tiny_engine, tmp_path, "--api-key-file", keys, "--threads", 1) as started:
        assert started.request("GET", "/")[:2] == (200, PAGE)
        assert started.request("GET", "/v1/models")[0] == 401
    with running(tiny_engine, tmp_path, "--no-page", "--threads", 1) as started:
        assert started.request("GET", "/")[0] == 404
    assert ServerSettings().page


def test_it_is_part_of_the_package():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert FILE.name in project["tool"]["setuptools"]["package-data"]["serving"]
