"""What `python -m runtime` prints: one line of counts, and the rounds by drafter."""

from rich.table import Table

from quasar.cli import add_column, console
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
        add_column(table, column, names=column == "drafter")
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
