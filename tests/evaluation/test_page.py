"""The report's page: it loads nothing, no panel is empty, and it says what the figures say."""

import re
from xml.etree import ElementTree as ET

import pytest

from evaluation.page import html_page
from evaluation.plots import linear_map, precision_map
from evaluation.report import report
from export.build_options import Silent
from quasar.text import Prompt

PROMPTS = [
    Prompt(messages=({"role": "user", "content": text},)) for text in ("one two one two one", "A kettle is a vessel.")
]
SVG = "{http://www.w3.org/2000/svg}"


def figures_of(engine):
    return report(engine, PROMPTS, float_model=None, steps=Silent().steps)


@pytest.fixture(scope="module")
def figures(tiny_engine):
    return figures_of(tiny_engine)


def drawings(page):
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def texts(svg):
    return ["".join(element.itertext()).strip() for element in svg.iter(f"{SVG}text")]


def test_page_needs_nothing_beside_itself(figures):
    page = html_page(figures)
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    # Inside it, figures refer to their own parts, and heat maps carry their pixels.
    references = re.findall(r"(?:href|src)=\"([^\"]*)\"", page)
    assert references
    assert all(one.startswith(("#", "data:image/png;base64,")) for one in references)
    assert html_page(figures) == page


def test_every_panel_has_labels_and_something_drawn(figures):
    by_position, precisions, loss, smoothing, outliers = drawings(html_page(figures))
    for svg in (precisions, loss, smoothing):
        assert {"layer", "self_attn.qkv_proj", "mlp.down_proj", "lm_head"} <= set(texts(svg))
        assert any(True for _ in svg.iter(f"{SVG}image"))
    assert {"position, tokens", "mean KL, nats", "top-1 agreement, %", "answers"} <= set(texts(by_position))
    assert {"largest input", "layer", "before", "after"} <= set(texts(outliers))
    for svg in (by_position, outliers):
        lines = [group for group in svg.iter(f"{SVG}g") if group.get("id", "").startswith("line2d")]
        assert len(lines) >= 4


def test_maps_hold_the_figures(figures):
    linears = figures["linears"]
    [loss] = drawings(linear_map(linears, "sqnr_db", "SQNR, dB", "viridis"))
    shown = texts(loss)
    assert {f"{entry['sqnr_db']:.3g}" for entry in linears.values()} <= set(shown)
    mixed = {name: {**entry, "precision": "float"} for name, entry in linears.items()}
    mixed["lm_head"]["precision"] = "w8a8-block"
    [precisions] = drawings(precision_map(mixed))
    assert {"float", "w8a8-block"} <= set(texts(precisions))
    assert "w8a8-token" not in texts(precisions)


def test_tables_hold_the_figures(figures):
    page = html_page(figures)
    assert f"{figures['mean_kl_nats']:.4f}" in page
    assert f"{figures['continuation']['mean_kl_nats']:.4f}" in page
    for step in figures["search"]["steps"]:
        assert f"<td>{step['step']}</td><td>{step['blocks']}</td><td>{step['kept']}</td>" in page
    for name, reached in figures["search"]["precisions"].items():
        assert f"<td>{name}</td><td>{reached['kl']:.4f}</td>" in page
    for row in figures["details"]["prompts"]["margins"]:
        assert f"<td>below {row['below']:g}</td><td>{100 * row['rows']:.1f} %</td>" in page


def test_what_an_engine_lacks_is_said_in_words(tiny_model, build_engine):
    page = html_page(figures_of(build_engine(tiny_model, precision="fp32")))
    assert "Every linear is float" in page
    assert len(drawings(page)) == 1
    page = html_page(figures_of(build_engine(tiny_model, alpha="off")))
    assert "No linear is smoothed." in page
    assert len(drawings(page)) == 4


def test_overlap_and_names_are_written_safely(figures):
    page = html_page({**figures, "calibration_overlap": 2, "model": "<b>bold</b>"})
    assert "2 of these prompts were calibrated on" in page
    assert "<b>bold</b>" not in page
