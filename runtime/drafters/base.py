"""The interface of every drafter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quasar.errors import FaultError

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
# A row of logits and a token's position → the token.
Draw = Callable[[Float32, int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Proposed tokens int64 [K].

    `parents` int64 [K]: the draft token that each one follows, which comes before it (-1: the pending token); None
    means a chain. Siblings are different tokens.

    `evidence` int64 [K]: numbers of the drafter's own for what a guess rests on, as how long a match was. How often
    guesses of the same number are right is what the controller learns; None lets it go by depth.
    """

    tokens: Int64
    parents: Int64 | None = None
    evidence: Int64 | None = None


NO_DRAFT = Draft(tokens=np.empty(0, np.int64))


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens that may follow a context.

    What a drafter may have besides: `observe` (`ObservingDrafter`); `sample_with` (`SamplingDrafter`);
    `seconds_per_token`, where drafting takes so long that it is asked only when that pays (`SlowDrafter`); a `name` for
    statistics; `prior(evidence) -> float`, the probability that a guess is right before any was seen; and `leads`: what
    it proposes is taken for its own, whoever else says the same.
    """

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """At most `max_tokens` tokens to follow `context` int64 [n] (prompt and everything emitted); may be none.

        The context is a view of a buffer that grows: copy what is kept.
        """


@runtime_checkable
class ObservingDrafter(Protocol):
    """A drafter that learns from what the verifier saw."""

    def observe(self, tokens: Int64, successors: Int64) -> None:
        """After a pass: its `tokens` int64 [M] and the verifier's likeliest tokens after them, int64 [M, k].

        Drafts that were accepted come last. Only on engines whose graph tells them (`top_tokens`).
        """


@runtime_checkable
class SamplingDrafter(Protocol):
    """A drafter that chooses among tokens by logits of its own."""

    def sample_with(self, draw: Draw) -> None:
        """The sequence is drawn: with the target's draw at the same position the two agree most often."""


@runtime_checkable
class SlowDrafter(Drafter, Protocol):
    """A drafter whose time counts beside that of a pass: it is asked only where that pays."""

    @property
    def seconds_per_token(self) -> float:
        """Seconds that a token is expected to take, before any was drafted; infinite once this sequence gets none."""


def ask(drafter: Drafter, context: Int64, max_tokens: int, *, trees: bool) -> Draft:
    """The drafter's proposal, checked.

    Raises:
        FaultError: arrays that a draft cannot have, more than `max_tokens` tokens, a tree where `trees` are not
            exact, or parents that are none.
    """
    draft = drafter.propose(context, max_tokens)
    tokens, parents = draft.tokens, draft.parents
    for name, array in (("tokens", tokens), ("parents", parents), ("evidence", draft.evidence)):
        if array is not None and not _is_column(array):
            came = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise FaultError(f"drafter {name_of(drafter)!r} proposed {name} as {came}; an int64 array [K] was expected")
    if len(tokens) > max_tokens:
        raise FaultError(
            f"drafter {name_of(drafter)!r} proposed {len(tokens)} tokens; at most {max_tokens} were expected"
        )
    if draft.evidence is not None and draft.evidence.shape != tokens.shape:
        raise FaultError(
            f"drafter {name_of(drafter)!r} proposed {len(draft.evidence)} numbers as evidence for {len(tokens)} "
            "tokens; one for each was expected"
        )
    if parents is None:
        return draft
    if not trees:
        raise FaultError(
            f"drafter {name_of(drafter)!r} proposed a tree, and trees are not exact on this engine's kernels (native "
            "ones are): let it propose a chain, without parents"
        )
    if parents.shape != tokens.shape or not all(-1 <= parent < place for place, parent in enumerate(parents.tolist())):
        raise FaultError(
            f"drafter {name_of(drafter)!r} proposed parents {parents.tolist()}; for {len(tokens)} tokens, as many "
            "indices of earlier ones (or -1) were expected"
        )
    return draft


def _is_column(array: object) -> bool:
    """Whether this is an array of integers with one axis."""
    return isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype.kind in "iu"


def leads(drafter: Drafter) -> bool:
    """Whether a guess of several drafters counts as this one's."""
    return bool(getattr(drafter, "leads", False))


def name_of(drafter: Drafter) -> str:
    """What statistics call it."""
    return str(getattr(drafter, "name", "") or type(drafter).__name__)
