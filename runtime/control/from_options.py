"""From the options of a generation to what decides about its drafts."""

from engines.probes.row_invariance import RowInvariance
from quasar.errors import GenerationError
from runtime.control.control import Control, NoControl
from runtime.control.controller import Controller, Knowledge
from runtime.control.fixed import FixedControl
from runtime.drafters.base import Draw, SamplingDrafter
from runtime.drafters.named import AUTO, DrafterOption, VerifierProfile, make_drafters
from runtime.grammar.drafts import ForcedTokens, guide
from runtime.grammar.matcher import GrammarState


def make_control(
    asked: DrafterOption,
    num_draft_tokens: int | None,
    *,
    target: VerifierProfile,
    exact: RowInvariance,
    knowledge: Knowledge,
    draw: Draw | None = None,
    grammar: GrammarState | None = None,
) -> Control:
    """One drafter with a number drafts so many in every round; else a controller chooses, at most that many.

    Args:
        asked, num_draft_tokens: the options `drafter` and `num_draft_tokens`.
        exact: which passes are exact on this machine.
        knowledge: what the engine's sequences have in common.
        draw: the target's own draw, where it draws tokens: drafters that sample share its randomness.
        grammar: where the answer stands in its grammar: its forced tokens are drafted, and nothing that it forbids.

    Raises:
        GenerationError: an unknown drafter, one that this engine cannot have, or passes that are not exact here.
    """
    if exact.chain is None and asked == AUTO:
        return NoControl()
    if num_draft_tokens is not None and num_draft_tokens < 0:
        raise GenerationError(f"num_draft_tokens is {num_draft_tokens}; 0 or more was expected")
    if num_draft_tokens is not None and exact.chain is not None and num_draft_tokens >= exact.widest:
        raise GenerationError(
            f"num_draft_tokens is {num_draft_tokens}; on this machine 0 to {exact.widest - 1} drafts are verified "
            "exactly"
        )
    drafters = make_drafters(asked, target)
    if not drafters:
        return NoControl()
    if draw is not None:
        for drafter in drafters:
            if isinstance(drafter, SamplingDrafter):
                drafter.sample_with(draw)
    if exact.chain is None:
        raise GenerationError(
            "on this machine a position's bits depend on how many are fed, so speculation would not be exact: "
            "use drafter='none', or 'auto', which then drafts nothing"
        )
    if grammar is not None:
        drafters = guide(drafters, grammar)
    if num_draft_tokens is not None and len(drafters) == 1:
        return FixedControl(drafters[0], num_draft_tokens, trees=exact.tree)
    return Controller(
        drafters if grammar is None else [ForcedTokens(grammar), *drafters],
        knowledge,
        most=exact.widest - 1 if num_draft_tokens is None else num_draft_tokens,
        trees=exact.tree,
        plain_width=exact.chain,
    )
