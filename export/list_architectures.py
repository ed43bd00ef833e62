"""The decoder families that can be built, for people and programs: what names them, what is supported and tested."""

from typing import Any

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.architectures.checks import CHECKS
from quasar.checkpoints.architectures.families import ARCHITECTURES


def architectures_json() -> dict[str, Any]:
    """Every family, and what the names under `tested` mean."""
    return {"architectures": [_family(one) for one in ARCHITECTURES.values()], "checks": dict(CHECKS)}


def print_architectures() -> None:
    """A paragraph for each family on stdout, and what its tests are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column()
    for one in ARCHITECTURES.values():
        family = _family(one)
        rows = {
            "config.json": ", ".join(family["classes"]),
            "GGUF": family["gguf"] or "not read",
            "options": family["options"],
            "tested": ", ".join(family["tested"]),
        }
        table.add_row(one.name, "models", one.models)
        for title, text in rows.items():
            table.add_row("", title, text)
    table.add_section()
    for name, meaning in CHECKS.items():
        table.add_row("tested:", name, meaning)
    Console(highlight=False, markup=False).print(table)


def _family(one: Architecture) -> dict[str, Any]:
    return {
        "model_type": one.name,
        "classes": [one.model_class, *one.other_classes, *one.wrapper_classes],
        "models": one.models,
        "gguf": None if one.gguf is None else one.gguf.architecture,
        "options": one.options,
        "tested": list(one.tested),
    }
