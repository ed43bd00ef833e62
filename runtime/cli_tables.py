"""What `python -m runtime` prints: one line of counts, and tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from quasar.cli import console
from runtime.stats import Stats


def describe(stats: Stats) -> str:
    """One line of counts and speed."""
    reused = f" ({stats.reused_tokens} of them reused)" if stats.reused_tokens else ""
    seed = "" if stats.seed is None else f", seed {stats.seed}"
    return (
        f"{stats.tokens} tokens in {stats.rounds} rounds, acceptance length {stats.acceptance_length:.2f} "
        f"({stats.accepted} of {stats.drafted} drafts accepted), {stats.tokens_per_second:.1f} tokens/s, "
        f"prefill {stats.prompt_tokens} tokens{reused} in {stats.prefill_seconds:.2f} s{seed}"
    )


def print_drafts(stats: Stats) -> None:
    """Rounds by drafter and length; what a controller expected of them beside what came."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("drafter", "K", "rounds", "tokens per round", "expected tokens", "ms per round", "expected ms"):
        _add_column(table, column, names=column == "drafter")
    for one in stats.drafts:
        expected = ["", ""]
        if one.expected_rounds:
            expected = [
                f"{one.expected_tokens / one.expected_rounds:.2f}",
                f"{1e3 * one.expected_seconds / one.expected_rounds:.2f}",
            ]
        table.add_row(
            one.drafter or "none",
            str(one.num_draft_tokens),
            str(one.rounds),
            f"{one.tokens / one.rounds:.2f}",
            expected[0],
            f"{1e3 * one.seconds / one.rounds:.2f}",
            expected[1],
        )
    console().print(table)


def print_bench(result: dict[str, Any]) -> None:
    """The arms of a run, their ratios, and these by category."""
    out = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "tokens", "decode s", "tokens/s", "acceptance length", "ms per round", "prefill s"):
        _add_column(table, column, names=column == "arm")
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


def print_simulation(result: dict[str, Any]) -> None:
    """What a replay came to, in all and by category."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ("", "prompts", "acceptance length", "speed-up", "mean over prompts", "ms per round", "of these drafting")
    for name in names:
        _add_column(table, name, names=not name)
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


def _add_column(table: Table, title: str, *, names: bool) -> None:
    """A column of names, which stay whole on a narrow screen, or of figures."""
    table.add_column(title, justify="left" if names else "right", no_wrap=names)
