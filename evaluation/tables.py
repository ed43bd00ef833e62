"""The tables of `bench` and `simulate`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from quasar.cli import add_column


def print_bench(result: dict[str, Any]) -> None:
    """The arms of a run, their ratios, and these by category."""
    out = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "tokens", "decode s", "tokens/s", "acceptance length", "ms per round", "prefill s"):
        add_column(table, column, names=column == "arm")
    for name, arm in result["arms"].items():
        table.add_row(
            name.replace("_", " "),
            str(arm["tokens"]),
            f"{arm['decode_seconds']:.1f}",
            f"{arm['tokens_per_second']:.1f}",
            f"{arm['acceptance_length']:.2f}",
            f"{arm['ms_per_round']:.2f}",
            f"{arm['prefill_seconds']:.1f}",
        )
    out.print(table)
    for name, ratio in result["ratios"].items():
        mean = result["mean_ratios"].get(name, ratio)
        out.print(f"{name.replace('_', ' ')}: {ratio:.2f} (mean over prompts {mean:.2f})")
    for category, part in result["categories"].items():
        if part["ratios"]:
            figures = ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}" for name, ratio in part["ratios"].items())
            out.print(f"  {category or 'all'}: {figures}", soft_wrap=True)


def print_together(result: dict[str, Any]) -> None:
    """What `bench --concurrency` found: a row for each number of requests and way to decode."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    found = result["concurrency"]
    fewest = min(found, key=int)
    least = found[fewest]["plain"]["tokens_per_second"]
    columns = ["requests", "arm", "tokens/s", f"of {fewest} plain", "first token ms", "p95", "between ms", "p95"]
    columns.append("a pass")
    for column in columns:
        add_column(table, column, names=column == "arm")
    for number, arms in found.items():
        for name, arm in arms.items():
            table.add_row(
                number,
                name,
                f"{arm['tokens_per_second']:.1f}",
                f"{arm['tokens_per_second'] / least:.2f}",
                *(f"{arm[kind][part]:.1f}" for kind in ("ttft_ms", "itl_ms") for part in ("p50", "p95")),
                f"{arm['sequences_per_pass']:.1f}",
            )
    Console(highlight=False).print(table)


def print_replay(result: dict[str, Any]) -> None:
    """What a replay came to, in all and by category."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ("", "prompts", "acceptance length", "speed-up", "mean over prompts", "ms per round", "of these drafting")
    for name in names:
        add_column(table, name, names=not name)
    for name, part in {"all": result, **result["categories"]}.items():
        table.add_row(
            name or "(no category)",
            str(part["prompts"]),
            f"{part['acceptance_length']:.2f}",
            f"{part['speed_up']:.2f}",
            f"{part['mean_speed_up']:.2f}",
            f"{part['ms_per_round']:.2f}",
            f"{part['draft_ms_per_round']:.2f}",
        )
    Console(highlight=False).print(table)
