"""The fidelity report as one HTML page: figures inside, nothing loaded from anywhere."""

from collections.abc import Mapping
from typing import Any

from evaluation.plots import amax_before_and_after, by_position, linear_map, precision_map

# Whatever a variable holds is escaped, but for drawings: those are SVG that we made.
_PAGE = """\
{% macro table(columns, rows) -%}
<table><thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{%- endmacro %}
{% macro section(title, about) -%}
<section><h2>{{ title }}</h2>
<p class="about">{{ about }}</p>
{{ caller() }}</section>
{%- endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
p { margin: .3rem 0 .6rem; max-width: 48rem; } .about { color: #52606d; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .15rem .9rem .15rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 1px solid #9aa5b1; font-weight: 600; }
svg { max-width: 100%; height: auto; } summary { cursor: pointer; margin-top: 2rem; }
</style></head>
<body>
<h1>{{ title }}</h1>
<p class="about">{{ about }}</p>
{% if overlap %}
<p><strong>{{ overlap }} of these prompts were calibrated on: the figures flatter.</strong></p>
{% endif %}
{{ table(["", "mean KL, nats", "top-1 agreement", "perplexity", "float model's", "tokens"], summary) }}
{% call section(
    "By position",
    "Both models read the same tokens. Prompts: the prompts' own tokens. Answers: the float model's own answers, the "
    "positions that a verifier decides."
) %}
{{ by_position | safe }}
{% endcall %}
{% call section(
    "Margins",
    "Positions by the gap between the verifier's two most likely tokens, in nats: how many there are, how often "
    "their first token is not the float model's, and what share of all disagreements is among them, which a check of "
    "those positions in float would catch."
) %}
{{ table(
    ["gap", "prompts: positions", "prompts: disagree", "prompts: caught", "answers: positions", "answers: disagree",
     "answers: caught"],
    margins
) }}
{% endcall %}
{% if linears %}
{% if steps %}
{% call section(
    "Search", "In how many blocks each step was kept, and by how much it lowered their errors there."
) %}
{{ table(["step", "blocks", "kept", "errors smaller by", "dropped"], steps) }}
{% endcall %}
{% endif %}
{% if reached %}
{% call section("Held-out text", "What quantized models reached on %s tokens of it." | format(held_back_tokens)) %}
{{ table(["model", "KL, nats", "KL on answers", "top-1"], reached) }}
{% endcall %}
{% endif %}
{% for title, about, drawing in drawings %}
{% call section(title, about) %}
{% if drawing %}
{{ drawing | safe }}
{% else %}
<p>No linear is smoothed.</p>
{% endif %}
{% endcall %}
{% endfor %}
<details><summary>All {{ linears | length }} linears</summary>
{{ table(
    ["linear", "precision", "SQNR, dB", "alpha", "smoothing", "range", "rounding", "amax before", "after"], linears
) }}
</details>
{% else %}
<p>Every linear is float: there is no quantization to show.</p>
{% endif %}
</body></html>
"""


def html_page(figures: Mapping[str, Any]) -> str:
    """The page for what `evaluation.report.report` returns."""
    from jinja2 import Environment, StrictUndefined

    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(_PAGE)
    kernels = f", {figures['kernels']} kernels" if figures["kernels"] else ""
    linears, search = figures["linears"], figures["search"]
    return page.render(
        title=f"{figures['model']}, {figures['precision']}",
        about=f"Engine {figures['engine']}{kernels} against its float model, {figures['prompts']} prompts.",
        overlap=figures["calibration_overlap"],
        summary=[_summary_row(label, figures[key] if key else figures) for label, key in _SUMMARIES],
        by_position=by_position(figures["details"]),
        margins=_margin_rows(figures["details"]),
        steps=[_step_row(step) for step in search.get("steps", []) if "blocks" in step],
        reached=_reached_rows(search),
        held_back_tokens=search.get("held_back_tokens", 0),
        drawings=_drawings(linears) if linears else [],
        linears=[[name, *(_cell(entry[key]) for key in _COLUMNS)] for name, entry in linears.items()],
    )


# Label and, where they are a part of the figures, the key.
_SUMMARIES = (("prompts", ""), ("answers", "continuation"))
_COLUMNS = ("precision", "sqnr_db", "alpha", "smoothing", "range", "rounding", "amax_before", "amax_after")


def _summary_row(label: str, part: Mapping[str, Any]) -> list[str]:
    return [
        label,
        f"{part['mean_kl_nats']:.4f}",
        f"{100 * part['top1_agreement']:.2f} %",
        f"{part['perplexity']:.3f}",
        f"{part['perplexity_float']:.3f}",
        str(part["tokens"]),
    ]


def _margin_rows(details: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"below {prompts['below']:g}",
            *(f"{100 * part[key]:.1f} %" for part in (prompts, answers) for key in ("rows", "disagreeing", "caught")),
        ]
        for prompts, answers in zip(details["prompts"]["margins"], details["continuation"]["margins"], strict=False)
    ]


def _step_row(step: Mapping[str, Any]) -> list[str]:
    gain, dropped = f"{100 * step['gain']:.0f} %", "yes" if step["dropped"] else "no"
    return [step["step"], str(step["blocks"]), str(step["kept"]), gain, dropped]


def _reached_rows(search: Mapping[str, Any]) -> list[list[str]]:
    """Whole models at each precision, and the mixed ones on the way to a bound."""
    rows = [
        [name, f"{found['kl']:.4f}", f"{found['answers_kl']:.4f}", f"{100 * found['top1']:.2f} %"]
        for name, found in search.get("precisions", {}).items()
    ]
    return rows + [
        [step["step"], f"{step['kl']:.4f}", "-", f"{100 * step['top1']:.2f} %"] for step in search.get("raised", [])
    ]


def _drawings(linears: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, what it shows, and the SVG; an empty one where no linear is smoothed."""
    smoothed = any(entry["alpha"] is not None for entry in linears.values())
    return [
        ("Precision", "What each linear computes in.", precision_map(linears)),
        (
            "Loss per linear",
            "SQNR of each linear's output on calibration text, in dB: higher is better; float linears are blank.",
            linear_map(linears, "sqnr_db", "SQNR, dB", "viridis"),
        ),
        (
            "Smoothing",
            "SmoothQuant's alpha of each group, where factors begin; blank: not smoothed.",
            linear_map(linears, "alpha", "alpha", "cividis") if smoothed else "",
        ),
        (
            "Outliers",
            "The largest input of each linear over the calibration text, before and after smoothing.",
            amax_before_and_after(linears),
        ),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
