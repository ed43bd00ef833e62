"""Figures as SVG text, for pages and files that need nothing beside themselves."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calibration.precisions.catalog import PRECISIONS
from evaluation.swept_engine import SweptEngine
from quasar.errors import BuildError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, BLUE, ORANGE, GRID = "#1f2933", "#2563a8", "#c2571a", "#e4e7eb"
# The linears of a layer, top to bottom of a map.
KINDS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
Linears = Mapping[str, Mapping[str, Any]]


def new_figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Any]]":
    """An empty figure in inches, without a display; raises `BuildError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BuildError(
            "matplotlib is not installed; figures need it: run pip install 'quasar-verifier[evaluation]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def to_svg(figure: "Figure") -> str:
    """The figure as an SVG element; the same figure gives the same characters."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "quasar", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def by_position(details: Mapping[str, Any]) -> str:
    """KL and top-1 agreement against the position, prompts and answers."""
    figure, (kl, top1) = new_figure(10, 3.2, columns=2)
    for part, label, colour in (("prompts", "prompts", BLUE), ("continuation", "answers", ORANGE)):
        bins = details[part]["by_position"]
        places = [f"{one['first']}-{'' if one['end'] is None else one['end'] - 1}" for one in bins]
        kl.plot(places, [one["mean_kl_nats"] for one in bins], "o-", color=colour, label=label)
        top1.plot(places, [100 * one["top1_agreement"] for one in bins], "o-", color=colour, label=label)
    for ax, label in ((kl, "mean KL, nats"), (top1, "top-1 agreement, %")):
        ax.set_xlabel("position, tokens", fontsize=9)
        ax.set_ylabel(label, fontsize=9)
        ax.grid(visible=True, color=GRID, linewidth=0.6)
        ax.legend(fontsize=8, frameon=False)
    kl.set_ylim(bottom=0)
    return to_svg(figure)


def linear_map(linears: Linears, key: str, label: str, colours: str) -> str:
    """A number of every linear as a heat map: layers across, kinds of linears down; the LM head at the right."""
    import numpy as np

    values = np.array([[_number(entry, key) for entry in row] for row in _grid(linears)])
    figure, [ax] = new_figure(10, 2.3)
    image = ax.imshow(values, aspect="auto", cmap=colours)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=5, color=_ink(image, value))
    _label_map(ax, values.shape[1])
    bar = figure.colorbar(image, ax=ax, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return to_svg(figure)


def precision_map(linears: Linears) -> str:
    """Which precision each linear has, as a map of colours with a legend."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    colours = {name: precision.colour for name, precision in PRECISIONS.items()}
    names = list(colours)
    values = [
        [float("nan") if entry is None else names.index(entry["precision"]) for entry in row] for row in _grid(linears)
    ]
    figure, [ax] = new_figure(10, 2.3)
    ax.imshow(
        values,
        aspect="auto",
        cmap=ListedColormap(list(colours.values())),
        norm=BoundaryNorm(range(len(names) + 1), len(names)),
    )
    _label_map(ax, len(values[0]))
    used = [name for name in names if any(entry["precision"] == name for entry in linears.values())]
    patches = [Patch(color=colours[name], label=name) for name in used]
    figure.legend(handles=patches, loc="outside right upper", fontsize=8, frameon=False)
    return to_svg(figure)


def amax_before_and_after(linears: Linears) -> str:
    """The largest input of each linear before and after smoothing, by layer, one panel for each kind."""
    rows = _grid(linears)
    figure, axes = new_figure(10, 2.8, columns=len(KINDS))
    for ax, kind, row in zip(axes, KINDS, rows, strict=True):
        entries = [entry for entry in row[:-1] if entry is not None]
        layers = range(len(entries))
        ax.plot(layers, [entry["amax_before"] for entry in entries], color=ORANGE, label="before")
        ax.plot(layers, [entry["amax_after"] for entry in entries], color=BLUE, label="after")
        ax.set_yscale("log")
        ax.set_title(kind, fontsize=9)
        ax.set_xlabel("layer", fontsize=8)
        ax.grid(visible=True, which="major", color=GRID, linewidth=0.6)
    axes[0].set_ylabel("largest input", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    return to_svg(figure)


def trade_off(swept: Sequence[SweptEngine]) -> str:
    """KL on prompts against t(8) and against bytes a pass, one point for each recipe."""
    figure, (by_time, by_bytes) = new_figure(11, 4.5, columns=2)
    kernels = "native" if all("native" in engine.ms for engine in swept) else "stock"
    panels: list[tuple[Any, str, Callable[[SweptEngine], float]]] = [
        (by_time, f"t(8) in ms, {kernels} kernels", lambda engine: engine.ms[kernels][8]),
        (by_bytes, "MB of weights read by a pass", lambda engine: engine.bytes_per_pass / 1e6),
    ]
    for ax, label, x_of in panels:
        for engine in swept:
            # A float engine's KL is rounding, and would stretch the axis.
            x, y = x_of(engine), max(engine.fidelity["mean_kl_nats"], 1e-4)
            ax.plot([x], [y], "o", color=ORANGE if "auto" in engine.recipe else BLUE, markersize=4)
            ax.annotate(engine.recipe, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        ax.set_yscale("log")
        ax.set_xlabel(label, fontsize=9)
        ax.set_ylabel("mean KL on prompts, nats", fontsize=9)
        ax.grid(visible=True, which="major", color=GRID, linewidth=0.6)
    return to_svg(figure)


def _grid(linears: Linears) -> list[list[Mapping[str, Any] | None]]:
    """Entries by kind and layer; the LM head follows the last layer, in the last row."""
    layers = 1 + max(int(name.split(".")[1]) for name in linears if name.startswith("layers."))
    rows: list[list[Mapping[str, Any] | None]] = [
        [linears[f"layers.{layer}.{kind}"] for layer in range(layers)] + [None] for kind in KINDS
    ]
    rows[-1][-1] = linears["lm_head"]
    return rows


def _number(entry: Mapping[str, Any] | None, key: str) -> float:
    return float("nan") if entry is None or entry[key] is None else float(entry[key])


def _ink(image: Any, value: float) -> str:
    red, green, blue, _ = image.cmap(image.norm(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK


def _label_map(ax: Any, columns: int) -> None:
    ax.set_yticks(range(len(KINDS)), KINDS, fontsize=8)
    ax.set_xticks(
        [*range(0, columns - 1, 5), columns - 1], [*map(str, range(0, columns - 1, 5)), "lm_head"], fontsize=8
    )
    ax.set_xlabel("layer", fontsize=8)
    ax.spines[:].set_visible(False)
