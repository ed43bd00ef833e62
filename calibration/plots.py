"""Figures as SVG text, for pages and files that need nothing beside themselves."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quasar.errors import BuildError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from calibration.sweep import SweptEngine

INK, BLUE, ORANGE, GREY = "#1f2933", "#2563a8", "#c2571a", "#9aa5b1"


def new_figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, Any]":
    """An empty figure in inches, without a display; raises `BuildError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BuildError(
            "matplotlib is not installed; figures need it: run pip install 'quasar-verifier[evaluation]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes[0] if columns == 1 else axes


def to_svg(figure: "Figure") -> str:
    """The figure as an SVG element; the same figure gives the same text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "quasar", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _label(ax: Any, text: str, x: float, y: float) -> None:
    ax.annotate(text, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")


def trade_off(swept: "Sequence[SweptEngine]") -> str:
    """KL on prompts against t(8) and against bytes a pass, one point for each recipe."""
    figure, (by_time, by_bytes) = new_figure(11, 4.5, columns=2)
    kernels = "native" if all("native" in engine.ms for engine in swept) else "stock"
    panels: list[tuple[Any, str, Callable[[SweptEngine], float]]] = [
        (by_time, f"t(8) in ms, {kernels} kernels", lambda engine: engine.ms[kernels][8]),
        (by_bytes, "MB of weights read by a pass", lambda engine: engine.bytes_per_pass / 1e6),
    ]
    for ax, label, x_of in panels:
        for engine in swept:
            x, y = x_of(engine), max(engine.fidelity["mean_kl_nats"], 1e-6)
            ax.plot([x], [y], "o", color=ORANGE if "auto" in engine.recipe else BLUE, markersize=4)
            _label(ax, engine.recipe, x, y)
        ax.set_yscale("log")
        ax.set_xlabel(label, fontsize=9)
        ax.set_ylabel("mean KL on prompts, nats", fontsize=9)
        ax.grid(visible=True, which="major", color="#e4e7eb", linewidth=0.6)
    return to_svg(figure)
