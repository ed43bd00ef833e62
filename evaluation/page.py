"""The fidelity report as one HTML page: figures inside, nothing loaded from anywhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluation.plots import amax_before_and_after, by_position, linear_map, precision_map

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
p { margin: .3rem 0 .6rem; max-width: 48rem; } .about { color: #52606d; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .15rem .9rem .15rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 1px solid #9aa5b1; font-weight: 600; }
svg { max-width: 100%; height: auto; } summary { cursor: pointer; margin-top: 2rem; }
"""


def html_page(figures: Mapping[str, Any]) -> str:
    """The page for what `evaluation.report.report` returns."""
    title = f"{figures['model']}, {figures['precision']}"
    kernels = f", {figures['kernels']} kernels" if figures["kernels"] else ""
    about = f"Engine {figures['engine']}{kernels} against its float model, {figures['prompts']} prompts."
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(about)}</p>',
        _overlap(figures["calibration_overlap"]),
        _summary(figures),
        _section(
            "By position",
            "Both models read the same tokens. Prompts: the prompts' own tokens. Answers: the float model's own "
            "answers, the positions that a verifier decides.",
            by_position(figures["details"]),
        ),
        _margins(figures["details"]),
    ]
    linears = figures["linears"]
    if linears:
        sections += _linear_sections(linears, figures["search"])
    else:
        sections.append("<p>Every linear is float: there is no quantization to show.</p>")
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _overlap(count: int) -> str:
    return f"<p><strong>{count} of these prompts were calibrated on: the figures flatter.</strong></p>" if count else ""


def _summary(figures: Mapping[str, Any]) -> str:
    rows = [
        [
            label,
            f"{part['mean_kl_nats']:.4f}",
            f"{100 * part['top1_agreement']:.2f} %",
            f"{part['perplexity']:.3f}",
            f"{part['perplexity_float']:.3f}",
            str(part["tokens"]),
        ]
        for label, part in (("prompts", figures), ("answers", figures["continuation"]))
    ]
    return _table(["", "mean KL, nats", "top-1 agreement", "perplexity", "float model's", "tokens"], rows)


def _margins(details: Mapping[str, Any]) -> str:
    rows = [
        [
            f"below {prompts['below']:g}",
            *(f"{100 * part[key]:.1f} %" for part in (prompts, answers) for key in ("rows", "disagreeing", "caught")),
        ]
        for prompts, answers in zip(details["prompts"]["margins"], details["continuation"]["margins"], strict=False)
    ]
    columns = [f"{part}: {what}" for part in ("prompts", "answers") for what in ("rows", "disagree", "caught")]
    return _section(
        "Margins",
        "Rows by the gap between the verifier's two most likely tokens, in nats: how many there are, how often their "
        "first token is not the float model's, and what share of all disagreements is among them, which a check of "
        "those rows in float would catch.",
        _table(["gap", *columns], rows),
    )


def _linear_sections(linears: Mapping[str, Any], search: Mapping[str, Any]) -> list[str]:
    smoothed = any(entry["alpha"] is not None for entry in linears.values())
    sections = [
        _section("Precision", "What each linear computes in.", precision_map(linears)),
        _section(
            "Loss per linear",
            "SQNR of each linear's output on calibration text, in dB: higher is better; float linears are blank.",
            linear_map(linears, "sqnr_db", "SQNR, dB", "viridis"),
        ),
        _section(
            "Smoothing",
            "SmoothQuant's alpha of each group, where factors begin; blank: not smoothed.",
            linear_map(linears, "alpha", "alpha", "cividis") if smoothed else "<p>No linear is smoothed.</p>",
        ),
        _section(
            "Outliers",
            "The largest input of each linear over the calibration text, before and after smoothing.",
            amax_before_and_after(linears),
        ),
    ]
    if search:
        rows = [
            [step["step"], f"{step['kl']:.4f}", f"{100 * step['top1']:.2f} %", "yes" if step["kept"] else "no"]
            for step in search["steps"]
        ]
        about = f"What each step reached on {search['held_back_tokens']} tokens of held-back calibration text."
        sections.insert(0, _section("Search", about, _table(["step", "KL, nats", "top-1", "kept"], rows)))
    columns = ["linear", "precision", "SQNR, dB", "alpha", "smoothing", "range", "rounding", "amax before", "after"]
    keys = ("precision", "sqnr_db", "alpha", "smoothing", "range", "rounding", "amax_before", "amax_after")
    rows = [[name, *(_cell(entry[key]) for key in keys)] for name, entry in linears.items()]
    sections.append(f"<details><summary>All {len(linears)} linears</summary>{_table(columns, rows)}</details>")
    return sections


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _section(title: str, about: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2>\n<p class="about">{escape(about)}</p>\n{content}</section>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
