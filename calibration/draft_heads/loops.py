"""Text that goes round in circles, as small models write: nothing is learned from saying it again."""

from collections.abc import Sequence

# A period of up to so many tokens, seen so often and over so many tokens, is a loop.
_LONGEST_PERIOD = 48
_REPETITIONS = 4
_LEAST_TOKENS = 24


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the second repetition of a loop at the end of `tokens` begins; None if they end in none."""
    for period in range(1, _LONGEST_PERIOD + 1):
        span = max(_REPETITIONS * period, _LEAST_TOKENS)
        if span > len(tokens):
            break
        last = len(tokens) - 1
        # Most periods fail at once.
        if tokens[last] != tokens[last - period]:
            continue
        same = 0
        while last - same - period >= 0 and tokens[last - same] == tokens[last - same - period]:
            same += 1
        if same >= span - period:
            return len(tokens) - same
    return None
