"""docs/serving.md and the dashboard name what is there."""

import json
import re
from pathlib import Path

import pytest
from typer.main import get_group

from serving.chat_request import CHAT_FIELDS
from serving.cli import app
from serving.completion_request import COMPLETION_FIELDS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")


def named(text):
    """What stands between back ticks, each name of it."""
    return set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]+)`", text))))


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("table", [CHAT_FIELDS, COMPLETION_FIELDS], ids=["chats", "completions"])
def test_every_field_is_on_the_page(table):
    assert set(table) <= named(section("Fields"))


def test_every_option_is_on_the_page():
    options = {name for one in get_group(app).commands["serve"].params for name in one.opts if name.startswith("--")}
    assert options - {"--help"} <= set(re.findall(r"--[a-z-]+", section("Options")))


def test_every_metric_is_on_the_page_and_every_name_is_a_metric(server):
    server.chat()
    there = {name for name, *_ in server.metrics()}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there}
    own = {name for name in families if name.startswith(("vllm:", "quasar:"))}
    told = set(re.findall(r"`((?:vllm|quasar):\w+)", section("Watching"))) - {"vllm:time_per_output_token_seconds"}
    assert told == own


def test_the_dashboard_asks_for_metrics_that_are_there(server):
    server.chat()
    there = {name for name, *_ in server.metrics()}
    dashboard = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    assert {"title", "panels", "templating", "schemaVersion"} <= dashboard.keys()
    panels = dashboard["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    for panel in panels:
        for target in panel["targets"]:
            asked = set(re.findall(r"(?:vllm|quasar):\w+", target["expr"]))
            assert asked
            assert asked <= there, panel["title"]
